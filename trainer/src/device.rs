//! Opens the device a rank computes on, and names the numeric fingerprint of this process.

use api::job::{DeviceKind, Resources};
use burn::tensor::Device;

use crate::error::TrainError;

/// The device of a rank, or one clear message why there is none.
///
/// Nothing is allocated on it yet, so the CLI may call this to refuse a job early.
pub fn open(kind: DeviceKind, local_rank: u32) -> Result<Device, TrainError> {
    match kind {
        DeviceKind::Cpu => Ok(Device::flex()),
        DeviceKind::Cuda => cuda(local_rank),
    }
}

#[cfg(feature = "cuda")]
fn cuda(local_rank: u32) -> Result<Device, TrainError> {
    use burn::tensor::DeviceType;
    // Opening a device without a driver panics, so ask first.
    let found = Device::enumerate(DeviceType::Cuda).into_vec().len();
    if (local_rank as usize) < found {
        return Ok(Device::cuda(local_rank as usize));
    }
    Err(TrainError::Job(format!(
        "device = \"cuda\": this host has {found} usable CUDA devices and the job wants number \
         {local_rank}: check `nvidia-smi`, ask for fewer ranks, or set resources.device = \"cpu\""
    )))
}

/// CUDA devices of this host that can be opened.
pub(crate) fn cuda_devices() -> u32 {
    #[cfg(feature = "cuda")]
    let found = Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec().len() as u32;
    #[cfg(not(feature = "cuda"))]
    let found = 0;
    found
}

#[cfg(not(feature = "cuda"))]
fn cuda(_local_rank: u32) -> Result<Device, TrainError> {
    Err(TrainError::Job(
        "device = \"cuda\": this `cluster` was built without CUDA support; build it with \
         `--features cuda` on a machine with an NVIDIA driver, or set resources.device = \"cpu\""
            .into(),
    ))
}

/// What the bits of the result depend on besides the job: kernel path, threads, versions.
///
/// A strict job goes on only under the fingerprint it began with.
pub fn fingerprint(resources: &Resources) -> String {
    let device = match resources.device {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
    };
    format!(
        "{device} {} {} threads={} cohort={} burn=0.22.1",
        std::env::consts::ARCH,
        instruction_set(),
        resources.threads_per_rank,
        env!("CARGO_PKG_VERSION"),
    )
}

#[cfg(target_arch = "x86_64")]
fn instruction_set() -> &'static str {
    // In the order in which the matrix kernels prefer them.
    if is_x86_feature_detected!("avx512f") {
        "avx512f"
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        "avx2+fma"
    } else {
        "sse2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instruction_set() -> &'static str {
    "baseline"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn cuda_without_cuda_is_a_clear_error() {
        let error = open(DeviceKind::Cuda, 0).expect_err("no CUDA here");
        assert!(!error.is_retryable());
        assert!(error.to_string().contains("resources.device = \"cpu\""), "{error}");
    }
}
