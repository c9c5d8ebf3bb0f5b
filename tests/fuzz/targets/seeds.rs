//! Writes the seeds of the target `qcow2_bytes` into the folder that is named: small images of some shapes.

use std::path::Path;

fn main() {
    let folder = std::env::args().nth(1).expect("usage: seeds FOLDER");
    for (name, image) in nbd_img_fuzz::formats::seeds() {
        std::fs::write(Path::new(&folder).join(name), image).expect("the seed cannot be written");
    }
}
