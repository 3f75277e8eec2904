//! Compiles the CUDA kernels of the feature `cuda` into one fat binary: machine code for Hopper, PTX for everything after Ampere.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo:rerun-if-changed=src/cuda/kernels");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=NVCC");
    let out = PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?);
    let nvcc = env::var_os("NVCC").map(PathBuf::from).or_else(|| {
        let home = env::var_os("CUDA_HOME").map(PathBuf::from)?;
        Some(home.join("bin/nvcc")).filter(|path| path.exists())
    });
    let nvcc = nvcc.unwrap_or_else(|| PathBuf::from("nvcc"));
    let mut sources: Vec<PathBuf> =
        fs::read_dir("src/cuda/kernels")?.map(|f| Ok(f?.path())).collect::<io::Result<_>>()?;
    sources.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    let mut table = String::from("pub(crate) const IMAGES: &[(&str, &[u8])] = &[\n");
    for source in &sources {
        let name = source.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        let image = out.join(format!("{name}.fatbin"));
        compile(&nvcc, source, &image)?;
        table.push_str(&format!("    ({name:?}, include_bytes!({:?})),\n", image.display().to_string()));
    }
    table.push_str("];\n");
    fs::write(out.join("images.rs"), table)
}

fn compile(nvcc: &Path, source: &Path, image: &Path) -> io::Result<()> {
    let status = Command::new(nvcc)
        .args(["-fatbin", "-std=c++17", "-O3", "--use_fast_math", "-lineinfo", "-compress-mode=size"])
        .args(["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_80,code=compute_80"])
        .arg("-o")
        .args([image, source])
        .status()
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}; set CUDA_HOME or NVCC", nvcc.display())))?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("nvcc failed on {}", source.display()))) }
}
