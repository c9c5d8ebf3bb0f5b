//! libFuzzer's entry to [`nbd_img_fuzz::formats::bytes`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_img_fuzz::formats::bytes::run(data));
