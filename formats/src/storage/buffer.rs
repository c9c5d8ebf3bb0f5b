//! [`IoBuf`]: bytes that an operation owns while it is under way, aligned as O_DIRECT wants them, and
//! [`BufPool`], which keeps them for the next one.

use crate::sync::{Arc, Mutex};

/// Alignment of the first byte: covers the logical block size of every device in use. Our choice.
const ALIGNMENT: usize = 4096;

/// The shortest and the longest buffer that a pool keeps: a page, and the largest read that is answered
/// as a whole.
const POOLED_LEN_MIN: usize = 4096;
const POOLED_LEN_MAX: usize = 2 << 20;

/// One for each power of two from the shortest to the longest.
const CLASS_COUNT: usize = (POOLED_LEN_MAX / POOLED_LEN_MIN).ilog2() as usize + 1;

/// Most bytes that a pool keeps: a full queue of 64 KiB requests. Our choice.
const KEPT_LEN_MAX: usize = 4 << 20;

/// A buffer whose bytes are aligned to 4096 and owned, so that it outlives whoever asked for the I/O.
#[derive(Default)]
pub struct IoBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    /// Where the memory goes when the buffer does.
    pool: Option<Arc<BufPool>>,
}

impl IoBuf {
    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let memory = vec![0; len.saturating_add(ALIGNMENT)];
        IoBuf { start: aligned_start(&memory), memory, len, pool: None }
    }

    /// A buffer with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut memory = Vec::with_capacity(bytes.len().saturating_add(ALIGNMENT));
        let start = aligned_start(&memory);
        memory.resize(start, 0);
        memory.extend_from_slice(bytes);
        IoBuf { memory, start, len: bytes.len(), pool: None }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// How far behind the start of the memory the first aligned byte is.
fn aligned_start(memory: &[u8]) -> usize {
    memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT)
}

impl std::ops::Deref for IoBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

impl std::ops::DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.keep(std::mem::take(&mut self.memory));
        }
    }
}

/// Buffers for the next operations: taken from here they come back when they go, from whichever thread.
///
/// What such a buffer holds at first is what it held last: only for who overwrites all of it, or looks at
/// no more than he has written. One pool serves one image, so that nothing of another one is in it.
#[derive(Default)]
pub struct BufPool {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    classes: [Vec<Vec<u8>>; CLASS_COUNT],
    len: usize,
}

impl BufPool {
    /// A pool that keeps nothing yet.
    pub fn new() -> Arc<BufPool> {
        Arc::default()
    }

    /// A buffer of `len` bytes of any content.
    pub fn take(self: &Arc<Self>, len: usize) -> IoBuf {
        let Some(class) = class_of(len) else { return IoBuf::zeroed(len) };
        let kept = {
            let mut kept = self.kept.lock();
            let memory = kept.classes.get_mut(class).and_then(Vec::pop);
            kept.len -= memory.as_ref().map_or(0, Vec::len);
            memory
        };
        let memory = kept.unwrap_or_else(|| vec![0; (POOLED_LEN_MIN << class) + ALIGNMENT]);
        IoBuf { start: aligned_start(&memory), memory, len, pool: Some(Arc::clone(self)) }
    }

    /// A buffer with a copy of `bytes`.
    pub fn copy_of(self: &Arc<Self>, bytes: &[u8]) -> IoBuf {
        if class_of(bytes.len()).is_none() {
            return IoBuf::copy_of(bytes);
        }
        let mut buf = self.take(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Gives back what it keeps.
    pub fn clear(&self) {
        *self.kept.lock() = Kept::default();
    }

    /// Bytes that it keeps.
    pub fn kept_len(&self) -> usize {
        self.kept.lock().len
    }

    fn keep(&self, memory: Vec<u8>) {
        let Some(class) = class_of(memory.len().saturating_sub(ALIGNMENT)) else { return };
        let mut kept = self.kept.lock();
        if kept.len + memory.len() <= KEPT_LEN_MAX
            && let Some(class) = kept.classes.get_mut(class)
        {
            let len = memory.len();
            class.push(memory);
            kept.len += len;
        }
    }
}

/// Which of the lengths that are kept holds `len` bytes.
fn class_of(len: usize) -> Option<usize> {
    if len > POOLED_LEN_MAX {
        return None;
    }
    let len = len.max(POOLED_LEN_MIN).next_power_of_two();
    usize::try_from((len / POOLED_LEN_MIN).ilog2()).ok()
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_aligned_and_of_the_asked_length() {
        let pool = BufPool::new();
        for len in [0, 1, 511, 4096, 1 << 20, (2 << 20) + 1] {
            let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
            for buf in [IoBuf::zeroed(len), IoBuf::copy_of(&bytes), pool.take(len), pool.copy_of(&bytes)] {
                assert_eq!((buf.len(), buf[..].len()), (len, len));
                assert_eq!(buf.as_ptr() as usize % ALIGNMENT, 0);
            }
            assert!(IoBuf::zeroed(len).iter().all(|byte| *byte == 0));
            assert!(IoBuf::copy_of(&bytes)[..] == bytes && pool.copy_of(&bytes)[..] == bytes);
        }
    }

    #[test]
    fn a_pool_keeps_what_comes_back_up_to_its_limit() {
        let pool = BufPool::new();
        let first = pool.take(5000);
        let address = first.as_ptr();
        std::thread::spawn(move || drop(first)).join().unwrap();
        assert_eq!(pool.kept_len(), 8192 + ALIGNMENT);
        let second = pool.take(8192);
        assert_eq!(second.as_ptr(), address);
        assert_eq!(pool.kept_len(), 0);
        drop(second);
        drop((0..100).map(|_| pool.take(1 << 20)).collect::<Vec<_>>());
        assert!(pool.kept_len() <= KEPT_LEN_MAX && pool.kept_len() > 1 << 20);
        drop(pool.take(3 << 20));
        pool.clear();
        assert_eq!(pool.kept_len(), 0);
        let last = pool.take(1);
        drop(pool);
        drop(last);
    }
}
