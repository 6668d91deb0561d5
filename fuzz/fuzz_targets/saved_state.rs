#![no_main]
#![doc = "The saved_state target: see src/saved_state.rs."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| flower_exporter_fuzz::saved_state::run(input));
