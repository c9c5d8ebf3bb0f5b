//! [`IoBuf`]: bytes that an operation owns while it is under way, aligned as O_DIRECT wants them.

/// Alignment of the first byte: covers the logical block size of every device in use. Our choice.
const ALIGNMENT: usize = 4096;

/// A buffer whose bytes are aligned to 4096 and owned, so that it outlives whoever asked for the I/O.
#[derive(Default)]
pub struct IoBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl IoBuf {
    /// A buffer of `len` zero bytes. The kernel provides them lazily; nothing is touched here.
    pub fn zeroed(len: usize) -> Self {
        let memory = vec![0; len.saturating_add(ALIGNMENT)];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        IoBuf { memory, start, len }
    }

    /// A buffer with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = IoBuf::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_aligned_and_of_the_asked_length() {
        for len in [0, 1, 511, 4096, 1 << 20] {
            let buf = IoBuf::zeroed(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf[..].len(), len);
            assert_eq!(buf.as_ptr() as usize % ALIGNMENT, 0);
        }
        assert_eq!(&IoBuf::copy_of(b"abc")[..], b"abc");
    }
}
