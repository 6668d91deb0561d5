#![no_main]
#![doc = "The event target: see src/event.rs."]

libfuzzer_sys::fuzz_target!(|script: &[u8]| flower_exporter_fuzz::event::run(script));
