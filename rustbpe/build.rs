//! Sets `cfg(avx512)` where Rust has these instructions: from 1.89 on.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(avx512)");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let output = Command::new(rustc).arg("--version").output().expect("rustc to tell its version");
    let version = String::from_utf8_lossy(&output.stdout).into_owned(); // rustc 1.89.0 (29483883e 2025-08-04)
    let mut numbers = version.split_whitespace().nth(1).unwrap_or("").split('.').map_while(|n| n.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) >= (Some(1), Some(89)) {
        println!("cargo:rustc-cfg=avx512");
    }
}
