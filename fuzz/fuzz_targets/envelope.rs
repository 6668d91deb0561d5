#![no_main]
#![doc = "The envelope target: see src/envelope.rs."]

libfuzzer_sys::fuzz_target!(|payload: &[u8]| flower_exporter_fuzz::envelope::run(payload));
