//! The copy in assembly, and the handler that knows its addresses.

use std::io;

use crate::sync::{Mutex, OnceLock};

// The fault must be in an instruction that leaves the number of bytes to go in a register; then the
// handler has nothing to do but to move the program counter.

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .text.nbd_img_guarded_copy,\"ax\",@progbits",
    ".globl nbd_img_guarded_copy",
    ".hidden nbd_img_guarded_copy",
    ".globl nbd_img_guarded_copy_begin",
    ".hidden nbd_img_guarded_copy_begin",
    ".globl nbd_img_guarded_copy_end",
    ".hidden nbd_img_guarded_copy_end",
    ".type nbd_img_guarded_copy,@function",
    "nbd_img_guarded_copy:",
    "endbr64",
    "mov rcx, rdx",
    "nbd_img_guarded_copy_begin:",
    "rep movsb",
    "nbd_img_guarded_copy_end:",
    "mov rax, rcx",
    "ret",
    ".size nbd_img_guarded_copy, . - nbd_img_guarded_copy",
    ".popsection",
);

#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".pushsection .text.nbd_img_guarded_copy,\"ax\",@progbits",
    ".globl nbd_img_guarded_copy",
    ".hidden nbd_img_guarded_copy",
    ".globl nbd_img_guarded_copy_begin",
    ".hidden nbd_img_guarded_copy_begin",
    ".globl nbd_img_guarded_copy_end",
    ".hidden nbd_img_guarded_copy_end",
    ".type nbd_img_guarded_copy,%function",
    "nbd_img_guarded_copy:",
    "hint #34",
    "nbd_img_guarded_copy_begin:",
    "cmp x2, #16",
    "b.lo 2f",
    "1:",
    "ldp x3, x4, [x1], #16",
    "stp x3, x4, [x0], #16",
    "sub x2, x2, #16",
    "cmp x2, #16",
    "b.hs 1b",
    "2:",
    "cbz x2, nbd_img_guarded_copy_end",
    "ldrb w3, [x1], #1",
    "strb w3, [x0], #1",
    "sub x2, x2, #1",
    "b 2b",
    "nbd_img_guarded_copy_end:",
    "mov x0, x2",
    "ret",
    ".size nbd_img_guarded_copy, . - nbd_img_guarded_copy",
    ".popsection",
);

unsafe extern "C" {
    /// See [`guarded_copy`](super::guarded_copy).
    pub(super) fn nbd_img_guarded_copy(dst: *mut u8, src: *const u8, len: usize) -> usize;
    /// First instruction that may fault.
    static nbd_img_guarded_copy_begin: u8;
    /// Where a copy goes on, faulted or not; just behind the last instruction that may fault.
    static nbd_img_guarded_copy_end: u8;
}

/// What handled SIGBUS before us. Written once, before the handler can run.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A memory error that the kernel tells of in advance; the program counter has nothing to do with it
/// (asm-generic/siginfo.h).
const BUS_MCEERR_AO: libc::c_int = 5;

/// Installs the handler, once for the process. Idempotent.
pub(in crate::storage) fn install() -> io::Result<()> {
    static INSTALLING: OnceLock<Mutex<()>> = OnceLock::new();
    let _installing = INSTALLING.get_or_init(|| Mutex::new(())).lock();
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    // SAFETY: all zeroes is a valid sigaction; it has only integers, and null for no handler.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with a null action the call only writes the one in force to the third argument.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    ours.sa_sigaction = handler as libc::sighandler_t;
    // On the alternate stack, because the thread's own may be what is gone; not masked, so that a fault
    // in a chained handler does not hang the process.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // The handler must find it from the first moment on.
    let _ = PREVIOUS.set(previous);
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and is async-signal-safe: it reads
    // statics that are set already and changes its own context only.
    if unsafe { libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let begin = std::ptr::addr_of!(nbd_img_guarded_copy_begin).addr();
    let end = std::ptr::addr_of!(nbd_img_guarded_copy_end).addr();
    // SAFETY: the kernel gives a valid siginfo and, with SA_SIGINFO, a valid ucontext that nobody else
    // uses as long as the handler runs.
    let (code, counter) = unsafe { ((*info).si_code, program_counter(&mut *context.cast())) };
    if code != BUS_MCEERR_AO
        && let Some(counter) = counter
        && counter.address() >= begin
        && counter.address() < end
    {
        counter.set(end);
        return;
    }
    // SAFETY: what came in is handed on unchanged.
    unsafe { chain(signal, info, context) };
}

/// The interrupted program counter.
#[cfg(target_arch = "x86_64")]
type Counter = libc::greg_t;
#[cfg(target_arch = "aarch64")]
type Counter = libc::c_ulonglong;

trait ProgramCounter {
    fn address(&self) -> usize;
    fn set(&mut self, address: usize);
}

impl ProgramCounter for Counter {
    fn address(&self) -> usize {
        // An address of this process: the same bits, whatever the sign.
        *self as usize
    }

    fn set(&mut self, address: usize) {
        *self = address as Counter;
    }
}

#[cfg(target_arch = "x86_64")]
fn program_counter(context: &mut libc::ucontext_t) -> Option<&mut Counter> {
    context.uc_mcontext.gregs.get_mut(usize::try_from(libc::REG_RIP).ok()?)
}

#[cfg(target_arch = "aarch64")]
fn program_counter(context: &mut libc::ucontext_t) -> Option<&mut Counter> {
    Some(&mut context.uc_mcontext.pc)
}

/// Hands the signal to whoever had it before; without anybody, the default action ends the process
/// when the instruction faults again.
///
/// # Safety
///
/// The arguments are those of a handler with SA_SIGINFO that runs now.
unsafe fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type WithInfo = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    type Plain = extern "C" fn(libc::c_int);
    match PREVIOUS.get() {
        Some(previous) if ![libc::SIG_DFL, libc::SIG_IGN].contains(&previous.sa_sigaction) => {
            if previous.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: SA_SIGINFO says that the address is a function of this type.
                let handler = unsafe { std::mem::transmute::<usize, WithInfo>(previous.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO the address is a function of this type.
                let handler = unsafe { std::mem::transmute::<usize, Plain>(previous.sa_sigaction) };
                handler(signal);
            }
        }
        Some(_) | None => {
            // SAFETY: signal(2) is async-signal-safe, and SIG_DFL is always valid.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}
