//! `cluster self-test`: whether memory, arithmetic and devices of this host do what they should. Run
//! by a worker in a process of its own, so that a broken device ends nothing else.
//!
//! Sums are of small whole numbers, which every type of float holds exactly: their checksum is the
//! same in any order of summation, on any device.

use std::process::ExitCode;

use api::job::DeviceKind;
use burn::tensor::{Device, Tensor, TensorData};

use crate::device;

/// Bytes allocated and verified. Enough to meet a limit that is reached; small beside a rank.
const MEMORY_BYTES: usize = 32 << 20;
/// Side of the matrices.
const SIDE: usize = 64;
/// FNV-1a of the product's elements as whole numbers, row by row.
const PRODUCT_CHECKSUM: u64 = 0x5441_5926_9847_395c;
/// The constants of FNV-1a with 64 bits, of RFC 9923.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// Something that computes, by one way to it.
trait Computes {
    /// How people call it, such as "cpu".
    fn name(&self) -> String;

    /// The product of two matrices of [`SIDE`] rows and columns, row by row.
    ///
    /// # Errors
    /// Why it cannot be opened or does not answer.
    fn product(&self, left: &[f32], right: &[f32]) -> Result<Vec<f32>, String>;
}

/// The processor, by nothing but loops.
struct Processor;

impl Computes for Processor {
    fn name(&self) -> String {
        "the processor".into()
    }

    fn product(&self, left: &[f32], right: &[f32]) -> Result<Vec<f32>, String> {
        let mut product = vec![0.0; SIDE * SIDE];
        for (row, sums) in product.chunks_exact_mut(SIDE).enumerate() {
            for inner in 0..SIDE {
                let factor = std::hint::black_box(left[row * SIDE + inner]);
                let others = &right[inner * SIDE..(inner + 1) * SIDE];
                sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += factor * other);
            }
        }
        Ok(product)
    }
}

/// A device that ranks compute on, opened as they open it.
struct RankDevice {
    kind: DeviceKind,
    number: u32,
}

impl Computes for RankDevice {
    fn name(&self) -> String {
        match self.kind {
            DeviceKind::Cpu => "device cpu".into(),
            DeviceKind::Cuda => format!("device cuda {}", self.number),
        }
    }

    fn product(&self, left: &[f32], right: &[f32]) -> Result<Vec<f32>, String> {
        let device = device::open(self.kind, self.number).map_err(|error| error.to_string())?;
        let matrix = |values: &[f32], device: &Device| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), [SIDE, SIDE]), device)
        };
        let product = matrix(left, &device).matmul(matrix(right, &device));
        product.into_data().try_to_vec::<f32>().map_err(|error| format!("{error:?}"))
    }
}

/// Runs every test; one line on standard output for each that fails, and then code 1.
pub fn run_self_test() -> ExitCode {
    let mut found = Vec::new();
    if let Err(text) = memory() {
        found.push(text);
    }
    let mut computers: Vec<Box<dyn Computes>> = vec![Box::new(Processor)];
    let cpu = std::iter::once((DeviceKind::Cpu, 0));
    let gpus = (0..device::cuda_devices()).map(|number| (DeviceKind::Cuda, number));
    for (kind, number) in cpu.chain(gpus) {
        computers.push(Box::new(RankDevice { kind, number }));
    }
    for computer in computers {
        if let Err(text) = arithmetic(computer.as_ref()) {
            found.push(format!("{}: {text}", computer.name()));
        }
    }
    found.iter().for_each(|line| println!("{line}"));
    ExitCode::from(u8::from(!found.is_empty()))
}

/// Allocates memory, fills it with a pattern and its complement, and reads both back.
fn memory() -> Result<(), String> {
    let words = MEMORY_BYTES / size_of::<u64>();
    let mut memory: Vec<u64> = Vec::new();
    let mebibytes = MEMORY_BYTES >> 20;
    memory
        .try_reserve_exact(words)
        .map_err(|error| format!("memory: cannot allocate {mebibytes} MiB: {error}"))?;
    memory.resize(words, 0);
    for mask in [0, u64::MAX] {
        let pattern = |index: usize| (index as u64).wrapping_mul(FNV_PRIME) ^ mask;
        memory.iter_mut().enumerate().for_each(|(index, word)| *word = pattern(index));
        let memory = std::hint::black_box(&memory);
        if let Some(index) = memory.iter().enumerate().position(|(i, word)| *word != pattern(i)) {
            let (found, expected) = (memory[index], pattern(index));
            return Err(format!(
                "memory: word {index} of {words} reads {found:016x}, {expected:016x} was written"
            ));
        }
    }
    Ok(())
}

fn arithmetic(computer: &dyn Computes) -> Result<(), String> {
    let matrix = |step: usize| -> Vec<f32> {
        (0..SIDE * SIDE).map(|index| (index * step % 17) as f32 - 8.0).collect()
    };
    let product = computer.product(&matrix(5), &matrix(7))?;
    let checksum = product.iter().fold(FNV_OFFSET, |hash, element| {
        let element = *element as i64 as u64;
        element
            .to_le_bytes()
            .iter()
            .fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME))
    });
    if checksum != PRODUCT_CHECKSUM {
        return Err(format!(
            "a product of matrices has the checksum {checksum:016x}, {PRODUCT_CHECKSUM:016x} is \
             right: it computes wrongly"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_passes() {
        assert_eq!(memory(), Ok(()));
        assert_eq!(arithmetic(&Processor), Ok(()));
        assert_eq!(arithmetic(&RankDevice { kind: DeviceKind::Cpu, number: 0 }), Ok(()));
    }

    /// Loses the lowest bit of one element.
    struct Broken;

    impl Computes for Broken {
        fn name(&self) -> String {
            "broken".into()
        }

        fn product(&self, left: &[f32], right: &[f32]) -> Result<Vec<f32>, String> {
            let mut product = Processor.product(left, right)?;
            product[77] += 1.0;
            Ok(product)
        }
    }

    #[test]
    fn a_wrong_element_is_noticed() {
        let found = arithmetic(&Broken).expect_err("it is wrong");
        assert!(found.ends_with("it computes wrongly"), "{found}");
    }
}
