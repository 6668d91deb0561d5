#![no_main]
#![doc = "See src/snapshot.rs."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| flower_exporter_fuzz::snapshot::run(input));
