#![no_main]
#![doc = "The config target: see src/config.rs."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    flower_exporter_fuzz::config::run(input);
});
