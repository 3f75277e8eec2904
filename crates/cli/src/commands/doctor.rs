//! `espalier doctor`.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use clap::Args;
use espalier_kernels::frozen::FrozenWeight;
use espalier_train::memory;
use serde::Serialize;

use crate::output::{Output, bytes};

/// Checks this machine: processor, memory, devices, the embedded model, the cache folder; with advice.
#[derive(Debug, Args)]
pub(crate) struct Doctor {}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    checks: Vec<Check>,
    ok: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "espalier {}", self.version)?;
        for check in &self.checks {
            writeln!(f, "  {} {:14} {}", if check.ok { "ok  " } else { "FAIL" }, check.name, check.found)?;
            if let Some(advice) = &check.advice {
                writeln!(f, "       {:14} {advice}", "")?;
            }
        }
        Ok(())
    }
}

fn processor() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let instructions = espalier_kernels::instructions().unwrap_or("unknown");
    let found = format!("{cores} threads, {} with {instructions} kernels", std::env::consts::ARCH);
    Check { name: "processor", ok: true, found, advice: None }
}

fn product_rate() -> Result<Check> {
    const N: usize = 1024;
    let values = |seed: f32| (0..N * N).map(|i| (i as f32 * 0.37 + seed).sin()).collect::<Vec<f32>>();
    let a = Tensor::from_vec(values(0.1), (N, N), &Device::Cpu)?;
    let b = Arc::new(FrozenWeight::dense(Tensor::from_vec(values(0.7), (N, N), &Device::Cpu)?)?);
    b.forward(&a)?;
    let began = std::time::Instant::now();
    for _ in 0..3 {
        b.forward(&a)?;
    }
    let rate = 3.0 * 2.0 * (N * N * N) as f64 / began.elapsed().as_secs_f64() / 1e9;
    Ok(Check { name: "f32 products", ok: true, found: format!("{rate:.0} GFLOP/s"), advice: None })
}

impl Doctor {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let mut checks = vec![processor(), product_rate()?];
        let free = memory::available();
        checks.push(Check {
            name: "memory",
            ok: free.is_none_or(|n| n > 1 << 30),
            found: free.map_or("unknown".into(), |n| format!("{} available", bytes(n))),
            advice: free.filter(|n| *n <= 1 << 30).map(|_| "less than 1 GiB is free; close other programs".into()),
        });
        let cuda = Device::cuda_if_available(0);
        checks.push(Check {
            name: "cuda",
            ok: true,
            found: match &cuda {
                Ok(device) if device.is_cuda() => "device 0 is ready".into(),
                Ok(_) => "this build has no CUDA (or there is no device)".into(),
                Err(e) => format!("not usable: {e}"),
            },
            advice: None,
        });
        let seedling = espalier_models::seedling::folder();
        checks.push(Check {
            name: "seedling",
            ok: seedling.is_ok(),
            found: seedling.as_ref().map_or_else(ToString::to_string, |p| p.display().to_string()),
            advice: seedling.is_err().then(|| "set ESPALIER_CACHE to a folder that can be written".into()),
        });
        let ok = checks.iter().all(|c| c.ok);
        out.result(&Report { version: env!("CARGO_PKG_VERSION"), checks, ok })?;
        if ok { Ok(()) } else { anyhow::bail!("a check failed") }
    }
}
