//! The program `nbd-img`.
fn main() {}
