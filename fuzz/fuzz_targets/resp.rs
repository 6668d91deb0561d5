#![no_main]
#![doc = "The resp target: see src/resp.rs."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| flower_exporter_fuzz::resp::run(input));
