#![no_main]
#![doc = "See src/envelope.rs."]

libfuzzer_sys::fuzz_target!(|payload: &[u8]| flower_exporter_fuzz::envelope::run(payload));
