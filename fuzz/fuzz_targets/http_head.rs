#![no_main]
#![doc = "The http_head target: see src/http_head.rs."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| flower_exporter_fuzz::http_head::run(input));
