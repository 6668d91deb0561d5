#![no_main]
#![doc = "The broker_url target: see src/broker_url.rs."]

libfuzzer_sys::fuzz_target!(|text: &str| flower_exporter_fuzz::broker_url::run(text));
