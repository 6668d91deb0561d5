#![no_main]
#![doc = "See src/settings.rs."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| flower_exporter_fuzz::settings::run(input));
