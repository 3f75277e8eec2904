//! The process that trials start, kill and start again when they run as tests: one job, named by the first argument.

fn main() -> anyhow::Result<()> {
    let job = std::env::args_os().nth(1).ok_or_else(|| anyhow::anyhow!("usage: trial-worker JOB"))?;
    espalier_trials::worker::main(job.as_ref())
}
