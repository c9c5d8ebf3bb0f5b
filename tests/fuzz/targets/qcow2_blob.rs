//! libFuzzer's entry to [`nbd_img_fuzz::formats::blob`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_img_fuzz::formats::blob::run(data));
