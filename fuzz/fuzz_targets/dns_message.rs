#![no_main]

#[path = "../dns.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::dns_message(data));
