//! A stage whose files are recorded, and what a crash may leave of them.

use nbd_img_formats::storage::{Fate, FileId, Log, SparseBytes};
use nbd_img_formats::sync::Arc;
use shuttle::rand::Rng;

use crate::shuttle_scenarios::Stage;
use crate::support::checker;
use crate::support::crash::{DATA, IMAGE};
use crate::support::image::Image;
use crate::support::scene::Scene;
use crate::support::units::{Journal, Writer};

/// Crashes that are looked at in each schedule.
const CRASHES: usize = 3;

/// A stage whose storages are recorded.
pub struct Recorded {
    pub stage: Stage,
    pub disk: Disk,
}

/// What a crash leaves of it.
#[derive(Clone)]
pub struct Disk {
    pub scene: Arc<Scene>,
    pub log: Arc<Log>,
}

impl Recorded {
    pub fn new(scene: &Arc<Scene>) -> Recorded {
        let log = Log::new();
        let stage = Stage::over(scene, |storage| log.attach(storage).unwrap());
        Recorded { disk: Disk { scene: Arc::clone(scene), log }, stage }
    }
}

impl Disk {
    /// After a crash now, what was not synced is lost, and this is there all the same.
    pub fn assert_durable(&self, at: u64, content: &[u8]) {
        let disk = self.after_loss();
        assert!(
            disk[at as usize..at as usize + content.len()] == *content,
            "lost after it was flushed: {at}"
        );
    }

    /// The disk after a crash now that loses all that was not synced.
    pub fn after_loss(&self) -> Vec<u8> {
        self.read(self.log.len(), |_| Fate::Lost)
    }

    /// Whenever the crash comes and whatever it loses, the image is sound.
    pub fn assert_sound(&self) {
        self.assert_crashes(|_| Ok(()));
    }

    /// The same, and the disk holds what it did at first or what one of these changes, as (offset, length,
    /// writer), has put there.
    pub fn assert_possible(&self, changes: &[(u64, u64, Writer)]) {
        let mut journal = Journal::new(&self.scene.content);
        for (at, len, writer) in changes {
            journal.begin((at / 64) as usize, ((at + len) / 64) as usize, *writer, 0);
        }
        self.assert_crashes(|disk| journal.check(disk, usize::MAX));
    }

    fn assert_crashes(&self, holds: impl Fn(&[u8]) -> Result<(), String>) {
        for _ in 0..CRASHES {
            let cut = shuttle::rand::thread_rng().gen_range(0..=self.log.len());
            let disk = self.read(cut, |_| match shuttle::rand::thread_rng().gen_range(0..4) {
                0 | 1 => Fate::Kept,
                2 => Fate::Lost,
                _ => Fate::Scattered(shuttle::rand::thread_rng().r#gen()),
            });
            holds(&disk).unwrap_or_else(|what| panic!("a crash at {cut} of {}: {what}", self.log.len()));
        }
    }

    /// What the guest sees after a crash, in an image that is sound and whose bitmaps can be relied on.
    fn read(&self, cut: usize, fate: impl Fn(usize) -> Fate) -> Vec<u8> {
        let left = |file| self.log.after_crash(file, cut, |record, _| fate(record));
        let image = left(IMAGE);
        let report = checker::check(&image).unwrap();
        assert!(report.is_sound(), "{report}");
        let disk = match &self.scene.data {
            None => self.scene.read(&image).unwrap(),
            Some(_) => self.scene.read_files(&image, &left(DATA)).unwrap(),
        };
        self.scene.check_bitmaps(&image, &disk).unwrap();
        disk
    }

    /// The image file as it is now.
    pub fn image_now(&self) -> SparseBytes {
        self.log.replay(FileId(0), self.log.len())
    }

    pub fn refcount_blocks(&self) -> usize {
        let now = self.image_now();
        Image::parse(&now).unwrap().refcount_table.iter().filter(|block| **block != 0).count()
    }
}
