//! A client of the streaming server after its upgrade, in any of the protocols. `shim` replays the corpus in its tests.
#![no_main]

libfuzzer_sys::fuzz_target!(|said: &[u8]| {
    windlass::streaming::fuzz_client(said);
});
