//! Key types cannot be printed, copied, written out or made of nothing, so nobody does it by accident.

use std::fmt::{Debug, Display};
use std::marker::PhantomData;

use envelope::{
    DataKey, DataKeyId, EncryptionContext, KeyMaterial, Opener, Sealer, WrappedDataKey, WrappedKeys,
};
use serde::Serialize;

/// The answer for a type that lacks the trait in question.
#[allow(dead_code, reason = "the compiler does not count a use in a constant")]
trait Otherwise {
    const ANSWER: bool = false;
}

impl<T> Otherwise for T {}

/// Whether a type implements a trait. The inherent constant exists only under that bound and wins where it
/// does.
macro_rules! implements {
    ($type:ty: $trait:path) => {{
        #[allow(dead_code, reason = "only its constants matter")]
        struct Probe<T>(PhantomData<T>);
        #[allow(dead_code, reason = "unused where the answer is no")]
        impl<T: $trait> Probe<T> {
            const ANSWER: bool = true;
        }
        <Probe<$type>>::ANSWER
    }};
}

macro_rules! secret {
    ($($type:ty),*) => {$(
        const {
            assert!(!implements!($type: Debug), "a key must not be printed");
            assert!(!implements!($type: Display), "a key must not be printed");
            assert!(!implements!($type: Clone), "a key must not be copied");
            assert!(!implements!($type: Serialize), "a key must not be written out");
            assert!(!implements!($type: Default), "a key must not be made of nothing");
            assert!(implements!($type: Send) && implements!($type: Sync));
        }
    )*};
}

#[test]
fn key_types_lack_what_would_leak_them() {
    secret!(KeyMaterial, DataKey, Sealer, Opener);
}

#[test]
fn the_probe_can_say_yes() {
    const {
        assert!(
            implements!(DataKeyId: Debug) && implements!(DataKeyId: Display) && implements!(DataKeyId: Clone)
        );
        assert!(implements!(EncryptionContext: Default) && implements!(String: Serialize));
        assert!(implements!(WrappedKeys: Debug) && implements!(WrappedDataKey: Clone));
    }
}

#[test]
fn key_material_is_32_bytes_and_taking_it_wipes_the_source() {
    for length in [0, 31, 33, 64] {
        let mut source = vec![7; length];
        assert_eq!(KeyMaterial::from_slice(&source).err(), Some(envelope::WrongLength(length)));
        assert!(KeyMaterial::from_mut(&mut source).is_err());
        assert!(source.iter().all(|byte| *byte == 0), "wiped even if it was no key");
    }
    let mut source = [7; 32];
    assert!(KeyMaterial::from_mut(&mut source).is_ok_and(|key| key.expose() == &[7; 32]));
    assert_eq!(source, [0; 32]);
}
