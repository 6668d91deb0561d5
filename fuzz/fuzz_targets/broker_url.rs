#![no_main]
#![doc = "See src/broker_url.rs."]

libfuzzer_sys::fuzz_target!(|text: &str| flower_exporter_fuzz::broker_url::run(text));
