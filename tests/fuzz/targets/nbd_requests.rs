//! libFuzzer's entry to [`nbd_img_fuzz::nbd::structured::requests`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_img_fuzz::nbd::structured::requests(data));
