//! [`FailingStorage`] and [`Faults`]: storage whose call number k fails, for tests.
//!
//! It keeps the promises of [`Storage`] about failed syncs, so that what is above is not tested against
//! something that no real file does.

use std::io;

use super::syncs::Syncs;
use super::{Durability, Operation, Queue, Run, Storage, StorageFacts, TryRead, engine};
use crate::address::{HostOffset, HostRange};
use crate::storage::Provision;
use crate::sync::{Arc, Mutex};

/// A class of calls, counted each for itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallClass {
    /// `len`
    Len,
    /// `pread`
    Read,
    /// `try_pread`
    TryRead,
    /// `pwrite`
    Write,
    /// `sync`
    Sync,
    /// `zero`
    Zero,
    /// `discard`
    Discard,
    /// `set_len`
    SetLen,
    /// `run_at`
    RunAt,
    /// `prefetch`
    Prefetch,
    /// `close`
    Close,
}

/// All classes.
pub const CALL_CLASSES: [CallClass; 11] = [
    CallClass::Len,
    CallClass::Read,
    CallClass::TryRead,
    CallClass::Write,
    CallClass::Sync,
    CallClass::Zero,
    CallClass::Discard,
    CallClass::SetLen,
    CallClass::RunAt,
    CallClass::Prefetch,
    CallClass::Close,
];

impl CallClass {
    /// Whether the call changes the storage or makes changes durable.
    pub fn mutates(self) -> bool {
        match self {
            CallClass::Write | CallClass::Sync | CallClass::Zero | CallClass::Discard | CallClass::SetLen => {
                true
            }
            CallClass::Len
            | CallClass::Read
            | CallClass::TryRead
            | CallClass::RunAt
            | CallClass::Prefetch
            | CallClass::Close => false,
        }
    }
}

/// Which call fails, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Calls of this class count, or of all classes.
    pub class: Option<CallClass>,
    /// Which of them fails, counted from 0 when the fault is armed.
    pub call: u64,
    /// With which errno.
    pub errno: i32,
    /// Whether all later ones fail too.
    pub sticky: bool,
    /// Bytes that a failing write has written all the same.
    pub written_len: usize,
    /// Panic instead of failing.
    pub panics: bool,
}

impl Fault {
    /// The call number `call` of any class fails once, with EIO, and does nothing.
    pub fn at(call: u64) -> Self {
        Fault { class: None, call, errno: libc::EIO, sticky: false, written_len: 0, panics: false }
    }
}

/// Counts the calls to all files of an image, and lets one of them fail.
#[derive(Default)]
pub struct Faults {
    state: Mutex<FaultState>,
}

#[derive(Default)]
struct FaultState {
    counts: [u64; CALL_CLASSES.len()],
    armed: Option<Fault>,
    /// Calls that the armed fault has counted.
    seen: u64,
    fired: u64,
}

impl Faults {
    /// Nothing fails yet.
    pub fn new() -> Arc<Faults> {
        Arc::new(Faults::default())
    }

    /// `inner`, whose calls are counted here and may fail.
    pub fn attach(self: &Arc<Self>, inner: Arc<dyn Storage>) -> Arc<FailingStorage> {
        Arc::new(FailingStorage { inner, faults: Arc::clone(self), syncs: Syncs::default() })
    }

    /// Lets a later call fail, in place of any fault armed before.
    pub fn arm(&self, fault: Fault) {
        let mut state = self.state.lock();
        state.armed = Some(fault);
        state.seen = 0;
        state.fired = 0;
    }

    /// Lets nothing fail any more.
    pub fn disarm(&self) {
        self.state.lock().armed = None;
    }

    /// How many calls the armed fault, or the last one, has failed.
    pub fn fired(&self) -> u64 {
        self.state.lock().fired
    }

    /// Calls of the class so far.
    pub fn count(&self, class: CallClass) -> u64 {
        self.state.lock().counts.get(class as usize).copied().unwrap_or_default()
    }

    /// Calls of all classes so far.
    pub fn total(&self) -> u64 {
        self.state.lock().counts.iter().sum()
    }

    /// Counts a call; gives the fault that it has to fail with.
    fn call(&self, class: CallClass) -> Option<Fault> {
        let mut state = self.state.lock();
        if let Some(count) = state.counts.get_mut(class as usize) {
            *count += 1;
        }
        let fault = state.armed.filter(|fault| fault.class.is_none_or(|counted| counted == class))?;
        let number = state.seen;
        state.seen += 1;
        let fails = number == fault.call || (fault.sticky && number > fault.call);
        state.fired += u64::from(fails);
        assert!(!(fails && fault.panics), "the panic that a test asked for");
        fails.then_some(fault)
    }
}

/// A storage that fails when its [`Faults`] say so, and else behaves as the one inside.
pub struct FailingStorage {
    inner: Arc<dyn Storage>,
    faults: Arc<Faults>,
    syncs: Syncs,
}

impl FailingStorage {
    fn check(&self, class: CallClass) -> io::Result<()> {
        if class.mutates() && self.syncs.is_failed() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        match self.faults.call(class) {
            None => Ok(()),
            Some(fault) => Err(io::Error::from_raw_os_error(fault.errno)),
        }
    }

    fn write(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        let Some(fault) = self.faults.call(CallClass::Write) else {
            return self.inner.pwrite(buf, at, durability);
        };
        let written = buf.get(..fault.written_len.min(buf.len())).unwrap_or_default();
        if !written.is_empty() {
            self.inner.pwrite(written, at, Durability::Later)?;
        }
        let error = io::Error::from_raw_os_error(fault.errno);
        let lost = durability.is_fua() && fault.errno == libc::EIO;
        Err(if lost { self.sync_failure(error) } else { error })
    }

    fn sync_failure(&self, error: io::Error) -> io::Error {
        if !self.inner.facts().direct {
            self.syncs.fail();
        }
        error
    }
}

impl Storage for FailingStorage {
    fn facts(&self) -> &StorageFacts {
        self.inner.facts()
    }

    fn len(&self) -> io::Result<u64> {
        self.check(CallClass::Len)?;
        self.inner.len()
    }

    fn allocated_len(&self) -> io::Result<u64> {
        self.check(CallClass::Len)?;
        self.inner.allocated_len()
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        self.check(CallClass::Read)?;
        self.inner.pread(buf, at)
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        self.check(CallClass::TryRead)?;
        self.inner.try_pread(buf, at)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        if self.syncs.is_failed() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        match durability {
            Durability::Later => self.write(buf, at, durability),
            Durability::Fua => self.syncs.write(|| self.write(buf, at, durability)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.sync(|| {
            self.check(CallClass::Sync).map_err(|error| self.sync_failure(error))?;
            self.inner.sync()
        })
    }

    fn is_failed(&self) -> bool {
        self.syncs.is_failed() || self.inner.is_failed()
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        self.check(CallClass::Zero)?;
        self.inner.zero(range, provision, fast)
    }

    fn reserve(&self, range: HostRange) -> io::Result<bool> {
        self.check(CallClass::Zero)?;
        self.inner.reserve(range)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        self.check(CallClass::Discard)?;
        self.inner.discard(range)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check(CallClass::SetLen)?;
        self.inner.set_len(len)
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        self.check(CallClass::RunAt)?;
        self.inner.run_at(at)
    }

    fn prefetch(&self, range: HostRange) -> io::Result<()> {
        self.check(CallClass::Prefetch)?;
        self.inner.prefetch(range)
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        // Not to the one inside: each operation is a call that may fail.
        engine::submit(&self, operations, queue);
    }

    fn close(&self) -> io::Result<()> {
        self.check(CallClass::Close)?;
        self.inner.close()
    }
}
