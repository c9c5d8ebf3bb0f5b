//! The raw driver: the file is the disk.
