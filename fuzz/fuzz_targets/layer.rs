//! A layer from anybody, compressed or not. `shim` replays the corpus in its tests.
#![no_main]

libfuzzer_sys::fuzz_target!(|stored: &[u8]| {
    let _ = windlass::image::fuzz_layer(stored);
});
