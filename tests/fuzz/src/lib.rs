//! What the fuzz targets do with their input.
//!
//! The bodies are plain functions of bytes that panic at what must not happen. The workspace's tests
//! (`formats/tests/fuzz_corpus.rs`, `tests/fuzz_corpus.rs`) take the same files in and replay the corpus, so
//! nothing here may need libFuzzer or a nightly compiler.

pub mod formats;
pub mod nbd;

#[path = "../../nbd_support/mod.rs"]
mod nbd_support;
#[path = "../../../formats/tests/support/mod.rs"]
mod support;
