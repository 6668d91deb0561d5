#![no_main]
#![doc = "See src/resp.rs."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| flower_exporter_fuzz::resp::run(input));
