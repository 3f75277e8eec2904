//! Rows by their places, and vectors end to end.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Device, Tensor, Var};
use common::*;
use espalier_kernels::rows::{concatenate, put_rows, take_rows};

#[test]
fn rows_that_were_taken_go_back_to_their_places() {
    for dtype in FUSED {
        let x = randn(&mut rng(1), &[9, 5], dtype);
        let index = Tensor::new(&[8u32, 0, 3], &Device::Cpu).unwrap();
        let taken = take_rows(&x, &index).unwrap();
        assert_eq!(taken.dims(), [3, 5]);
        assert_eq!(bits(&taken.narrow(0, 1, 1).unwrap()), bits(&x.narrow(0, 0, 1).unwrap()));
        let back = put_rows(&x.zeros_like().unwrap(), &index, &taken).unwrap();
        for row in 0..9 {
            let [there, was] = [&back, &x].map(|t| bits(&t.narrow(0, row, 1).unwrap()));
            let want = if [0, 3, 8].contains(&row) { was } else { vec![0; 5] };
            assert_eq!(there, want, "{dtype:?} row {row}");
        }
        assert!(take_rows(&x, &Tensor::new(&[9u32], &Device::Cpu).unwrap()).is_err());
    }
}

#[test]
fn vectors_end_to_end_are_off_the_tape() {
    let a = Var::from_tensor(&randn(&mut rng(1), &[2, 3], DType::F32)).unwrap();
    let b = randn(&mut rng(2), &[4], DType::F32);
    let all = concatenate(&[a.as_tensor().clone(), b.clone()]).unwrap();
    assert_eq!(all.dims(), [10]);
    assert!(!all.track_op());
    let want: Vec<u32> = bits(&a).into_iter().chain(bits(&b)).collect();
    assert_eq!(bits(&all), want);
    assert!(concatenate(&[b, Tensor::zeros(2, DType::F64, &Device::Cpu).unwrap()]).is_err());
}
