//! The libraries imago and qcow2-rs as further readers of what the driver has written.
//!
//! They only read, and only what each of them reads right: where that ends is said by [`Reader::reads`] and
//! nowhere else.

use std::fmt::Debug;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_alloc_dev_sync;

use crate::Pair;

/// What a buffer holds before it is read into: bytes that a reader forgets are seen.
const FORGOTTEN: u8 = 0xee;

/// Those who know a kind of image find this content in it.
pub fn assert_read(pair: &Pair, image: &Path, content: &[u8], said: &dyn Debug) {
    for reader in [Reader::Imago, Reader::Qcow2Rs].into_iter().filter(|reader| reader.reads(pair)) {
        let mut got = vec![FORGOTTEN; content.len()];
        reader.read(pair, image, &mut got);
        assert!(got == content, "{said:?}: {}: {reader:?} reads another content", image.display());
    }
}

/// A library that reads qcow2.
#[derive(Clone, Copy, Debug)]
enum Reader {
    Imago,
    Qcow2Rs,
}

impl Reader {
    /// Whether it reads images of this kind right.
    fn reads(self, pair: &Pair) -> bool {
        // Neither has zstd or subclusters: such images are refused.
        let known = !["zstd", "extended_l2"].iter().any(|option| pair.kind.options.contains(option));
        known
            && match self {
                // It also refuses what is not made here: dirty images.
                Reader::Imago => true,
                // It keeps pieces of 4 KiB of a table, and panics where a table is shorter. Where the backing file
                // has ended, it leaves the buffer as it was. It looks for all data in the image itself.
                Reader::Qcow2Rs => {
                    let end = pair.kind.size().next_multiple_of(pair.kind.cluster);
                    let inside = !pair.kind.options.contains("data_file");
                    inside && pair.kind.cluster >= 4096 && pair.base_len.is_none_or(|len| len >= end)
                }
            }
    }

    /// Fills the buffer from the start of the disk.
    fn read(self, pair: &Pair, image: &Path, buf: &mut [u8]) {
        match self {
            Reader::Imago => {
                let gate = PermissiveImplicitOpenGate::default();
                let image = Qcow2::<File>::builder_path(image).open(gate).unwrap();
                FormatAccess::new(image).read(buf, 0).unwrap();
            }
            Reader::Qcow2Rs => {
                // The name in the image would be taken from the test's own folder.
                let mut device = qcow2_rs(image, false);
                if pair.kind.backing {
                    device.set_backing_dev(Box::new(qcow2_rs(&pair.base(), true)));
                }
                at_once(device.qcow2_prep_io()).unwrap();
                assert_eq!(at_once(device.read_at(buf, 0)).unwrap(), buf.len());
            }
        }
    }
}

fn qcow2_rs(image: &Path, is_backing: bool) -> Qcow2Dev<Qcow2IoSync> {
    let params = Qcow2DevParams::new(9, None, None, true, false);
    if is_backing {
        params.mark_backing_dev(Some(true));
    }
    let io = Qcow2IoSync::new(image, true, false);
    qcow2_alloc_dev_sync(image, io, &params).unwrap().0
}

/// The result of a future over a file that is read at once: it has nothing to wait for.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("it waits"),
    }
}
