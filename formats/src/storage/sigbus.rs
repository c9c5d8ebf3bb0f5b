//! Copying out of a mapping that may lose its file: a fault ends the copy instead of the process.
//!
//! The copy is one short piece of assembly whose instructions are known to the handler of SIGBUS. A
//! fault there goes on behind the copy, which then tells how much is missing. Any other SIGBUS goes to
//! whoever handled it before. Nothing else of the process is touched.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod handler;

/// Copies `len` bytes from `src` to `dst` and returns how many bytes at the end could not be copied.
///
/// # Safety
///
/// `dst` is valid for writes of `len` bytes and does not overlap the source. `src` lies, with `len`
/// bytes behind it, in a mapping that stays mapped during the call; its file may do what it wants.
/// [`install`] has succeeded before.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) unsafe fn guarded_copy(dst: *mut u8, src: *const u8, len: usize) -> usize {
    // SAFETY: as promised by the caller; the handler is installed.
    unsafe { handler::nbd_img_guarded_copy(dst, src, len) }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use handler::install;

/// Nothing has to be installed where the kernel does the copy.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn install() -> std::io::Result<()> {
    Ok(())
}

/// As above: the kernel copies from this process to itself, and it does not raise signals.
///
/// # Safety
///
/// As above.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) unsafe fn guarded_copy(dst: *mut u8, src: *const u8, len: usize) -> usize {
    let mut done = 0;
    while done < len {
        // SAFETY: `done` is below `len`, so both pointers stay inside of what the caller promised.
        let (to, from) = unsafe { (dst.add(done), src.add(done)) };
        let local = libc::iovec { iov_base: to.cast(), iov_len: len - done };
        let remote = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: len - done };
        // SAFETY: both vectors describe memory of this process; a fault is reported, not raised.
        let got = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        match usize::try_from(got) {
            Ok(got) if got > 0 => done += got,
            _ => break,
        }
    }
    len - done
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;

    #[test]
    fn copy_stops_at_the_page_that_is_gone_and_tells_what_is_missing() {
        install().unwrap();
        install().unwrap();
        let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4 * 4096).unwrap();
        rustix::io::pwrite(&file, &[7; 4 * 4096], 0).unwrap();
        // SAFETY: the mapping is only read through the guarded copy.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        let mut buf = vec![1; 4 * 4096];
        // SAFETY: both are 4 pages long.
        let missing = unsafe { guarded_copy(buf.as_mut_ptr(), map.as_ptr(), buf.len()) };
        assert_eq!(missing, 0);
        assert_eq!(buf, vec![7; 4 * 4096]);
        rustix::fs::ftruncate(&file, 4096).unwrap();
        for (from, len, expected) in
            [(0, 4096, 0), (0, 16384, 12288), (4000, 97, 1), (8192, 5, 5), (8192, 0, 0)]
        {
            // SAFETY: the ranges lie within the buffer and the mapping.
            let missing = unsafe { guarded_copy(buf.as_mut_ptr(), map.as_ptr().add(from), len) };
            assert_eq!(missing, expected, "{len} bytes from {from}");
        }
    }
}
