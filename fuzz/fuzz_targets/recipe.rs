#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| espalier_trials::fuzz::run("recipe", bytes));
