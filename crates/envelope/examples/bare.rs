//! AES-256-GCM and nothing else, by the crate that this one uses: what `scripts/bench-bulk` compares streams with.
//!
//! Usage: `bare encrypt|decrypt GIB`: works on segments of 64 KiB, and says nothing. Its CPU time is the measure.

use aes_gcm::aead::consts::U12;
use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aes::Aes256Enc;
use aes_gcm::{AeadInOut, AesGcm, KeyInit, Nonce};

const SEGMENT_BYTES: usize = 65_536;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let gib: u64 = args[2].parse().expect("a number of GiB");
    let cipher: AesGcm<Aes256Enc, U12> = AesGcm::new(&[7; 32].into());
    let nonce = Nonce::<U12>::default();
    let mut segment = vec![0; SEGMENT_BYTES];
    let tag =
        cipher.encrypt_inout_detached(&nonce, &[], InOutBuf::from(segment.as_mut_slice())).expect("short");
    let sealed = segment.clone();
    for _ in 0..gib << 14 {
        if args[1] == "encrypt" {
            let segment = InOutBuf::from(segment.as_mut_slice());
            let _ = std::hint::black_box(cipher.encrypt_inout_detached(&nonce, &[], segment));
        } else {
            // A copy costs a fiftieth of what it is measured with.
            segment.copy_from_slice(&sealed);
            let segment = InOutBuf::from(segment.as_mut_slice());
            cipher.decrypt_inout_detached(&nonce, &[], segment, &tag).expect("its own");
        }
    }
}
