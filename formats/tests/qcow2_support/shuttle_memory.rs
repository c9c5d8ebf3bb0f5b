//! The files of shuttle's scenes, on the heap: a schedule takes a millisecond, so no file may be copied for it.
//!
//! It reads and behaves as `MemoryStorage` does, which is a real file that costs system calls and pages. Here the
//! scene's own bytes are shared by all schedules and only blocks that a schedule changes are copied. What a file
//! grows by, by megabytes at a time, and what is poisoned, is nowhere until it is written.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use nbd_img_formats::storage::{
    InPlace, MemoryOptions, MemoryStorage, Operation, POISON, Queue, Run, Storage, StorageFacts, StorageKind,
    TryRead,
};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::sync::atomic::{AtomicBool, Ordering};
use nbd_img_formats::{Durability, HostOffset, HostRange, Provision};

use shuttle::Runner;
use shuttle::scheduler::RandomScheduler;

use crate::shuttle_scenarios;
use crate::support::image::Bytes;
use crate::support::random::Random;
use crate::support::scene::Scene;

/// What a hole is made of, as the pages of a memory file are.
const BLOCK_LEN: usize = 4096;

type Block = [u8; BLOCK_LEN];

/// A file of a scene: which one, of the scene that every schedule shares.
#[derive(Clone)]
pub struct Original(Arc<Scene>, fn(&Scene) -> &[u8]);

impl Original {
    /// Its image.
    pub fn image(scene: &Arc<Scene>) -> Original {
        Original(Arc::clone(scene), |scene| &scene.image)
    }

    /// Its data file, if it has one.
    pub fn data(scene: &Arc<Scene>) -> Option<Original> {
        scene.data.as_ref()?;
        Some(Original(Arc::clone(scene), |scene| scene.data.as_deref().unwrap_or_default()))
    }

    /// Its backing file, if it has one.
    pub fn backing(scene: &Arc<Scene>) -> Option<Original> {
        scene.backing.as_ref()?;
        Some(Original(Arc::clone(scene), |scene| scene.backing.as_deref().unwrap_or_default()))
    }

    fn bytes(&self) -> &[u8] {
        (self.1)(&self.0)
    }
}

/// A file that begins as a scene's and grows. A close leaves it readable, so that it can be looked at.
pub struct SceneFile {
    facts: StorageFacts,
    /// Never shuttle's: nothing that a scheduler sees happens while it is held, and nobody ever waits for it.
    content: std::sync::Mutex<Content>,
    /// Looked at by each call, which is where another thread may come in between.
    closed: AtomicBool,
}

struct Content {
    original: Original,
    /// Bytes of the original that are still there.
    kept: usize,
    len: u64,
    /// What unused space reads as.
    unused: u8,
    /// Blocks that have changed; `None` is a hole.
    blocks: BTreeMap<u64, Option<Box<Block>>>,
}

impl SceneFile {
    /// One whose unused space reads as zeroes.
    pub fn zeroed(original: Original) -> Arc<SceneFile> {
        SceneFile::new(original, 0)
    }

    /// One whose unused space is poisoned.
    pub fn poisoned(original: Original) -> Arc<SceneFile> {
        SceneFile::new(original, POISON)
    }

    fn new(original: Original, unused: u8) -> Arc<SceneFile> {
        let facts = StorageFacts {
            path: PathBuf::from("(a scene's)"),
            kind: StorageKind::Memory,
            writable: true,
            grows: true,
            new_space_is_zero: unused == 0,
            direct: false,
            block_len: 1,
            reads: InPlace::Always,
            writes: InPlace::Always,
        };
        let kept = original.bytes().len();
        let content = Content { original, kept, len: kept as u64, unused, blocks: BTreeMap::new() };
        let closed = AtomicBool::new(false);
        Arc::new(SceneFile { facts, content: std::sync::Mutex::new(content), closed })
    }

    /// All of it, without a step of the scheduler.
    pub fn bytes(&self) -> FileBytes {
        let content = self.content.lock().unwrap();
        let changed = content.blocks.keys().next_back().map_or(0, |last| (last + 1) * BLOCK_LEN as u64);
        let used = content.len.min(changed.max(content.kept as u64));
        let mut bytes = vec![0; used as usize];
        content.read(&mut bytes, 0);
        FileBytes { used: bytes, len: content.len, unused: content.unused }
    }

    fn with<T>(&self, call: impl FnOnce(&mut Content) -> T) -> T {
        let _ = self.closed.load(Ordering::Acquire);
        call(&mut self.content.lock().unwrap())
    }
}

impl Content {
    /// Reads what lies within the file; returns how much that is.
    fn read(&self, buf: &mut [u8], at: u64) -> usize {
        let len = self.len.saturating_sub(at).min(buf.len() as u64) as usize;
        for (index, inside, range) in parts(at, len as u64) {
            let (part, inside) = (&mut buf[range], inside.start);
            match self.blocks.get(&index) {
                Some(Some(block)) => part.copy_from_slice(&block[inside..inside + part.len()]),
                Some(None) => part.fill(0),
                None => self.unchanged(part, index * BLOCK_LEN as u64 + inside as u64),
            }
        }
        len
    }

    /// What is there where no block has changed.
    fn unchanged(&self, buf: &mut [u8], at: u64) {
        let kept = self.original.bytes()[..self.kept].get(at as usize..).unwrap_or_default();
        let there = kept.len().min(buf.len());
        buf[..there].copy_from_slice(&kept[..there]);
        buf[there..].fill(self.unused);
    }

    fn block(&mut self, index: u64) -> &mut Block {
        if !self.blocks.contains_key(&index) {
            let mut block = Box::new([0; BLOCK_LEN]);
            self.unchanged(&mut block[..], index * BLOCK_LEN as u64);
            self.blocks.insert(index, Some(block));
        }
        let block = self.blocks.get_mut(&index).unwrap();
        block.get_or_insert_with(|| Box::new([0; BLOCK_LEN]))
    }

    fn write(&mut self, bytes: &[u8], at: u64) {
        if at > self.len {
            self.set_len(at);
        }
        for (index, inside, range) in parts(at, bytes.len() as u64) {
            self.block(index)[inside].copy_from_slice(&bytes[range]);
        }
        self.len = self.len.max(at + bytes.len() as u64);
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.blocks.split_off(&len.div_ceil(BLOCK_LEN as u64));
            self.kept = self.kept.min(len as usize);
        } else if let (index, inside @ 1..) = (self.len / BLOCK_LEN as u64, self.len as usize % BLOCK_LEN)
            && self.blocks.contains_key(&index)
        {
            // What was left there when the file was cut.
            let unused = self.unused;
            self.block(index)[inside..].fill(unused);
        }
        self.len = len;
    }

    /// Zeroes what lies within the file; whole blocks become holes. Where room is kept, a hole that is touched in
    /// part is data then.
    fn punch(&mut self, from: u64, to: u64, keeps: bool) {
        let end = to.min(self.len);
        for (index, inside, _) in parts(from, end.saturating_sub(from)) {
            if inside.len() == BLOCK_LEN {
                self.blocks.insert(index, None);
            } else if keeps || !self.is_hole(index) {
                self.block(index)[inside].fill(0);
            }
        }
    }

    fn poison(&mut self, range: HostRange) {
        let end = range.end().0.min(self.len);
        for (index, inside, _) in parts(range.at().0, end.saturating_sub(range.at().0)) {
            self.block(index)[inside].fill(POISON);
        }
    }

    fn is_hole(&self, index: u64) -> bool {
        match self.blocks.get(&index) {
            Some(block) => block.is_none(),
            None => self.unused == 0 && index * BLOCK_LEN as u64 >= self.kept as u64,
        }
    }
}

/// A range cut at the blocks' edges: the number of the block, the part inside of it, the part of the range.
fn parts(at: u64, len: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let end = at + len;
    let blocks = if len == 0 { 0..0 } else { at / BLOCK_LEN as u64..end.div_ceil(BLOCK_LEN as u64) };
    blocks.map(move |index| {
        let start = index * BLOCK_LEN as u64;
        let (from, to) = (at.max(start), end.min(start + BLOCK_LEN as u64));
        let inside = (from - start) as usize..(to - start) as usize;
        (index, inside, (from - at) as usize..(to - at) as usize)
    })
}

impl Storage for SceneFile {
    fn facts(&self) -> &StorageFacts {
        &self.facts
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().unwrap().len)
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        Ok(self.with(|content| content.read(buf, at.0)))
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        self.pread(buf, at).map(TryRead::Done)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, _durability: Durability) -> io::Result<()> {
        self.with(|content| content.write(buf, at.0));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|_| ());
        Ok(())
    }

    fn is_failed(&self) -> bool {
        false
    }

    fn zero(&self, range: HostRange, provision: Provision, _fast: bool) -> io::Result<()> {
        self.with(|content| {
            let (from, to, end) = (range.at().0, range.end().0, content.len);
            if provision == Provision::Allocate && to > end {
                content.set_len(to);
                // What is between is zeroes, too.
                content.punch(end, from, false);
            }
            content.punch(from, to, provision != Provision::Unmap);
        });
        Ok(())
    }

    fn reserve(&self, _range: HostRange) -> io::Result<bool> {
        self.with(|_| ());
        Ok(true)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        let poisoned = !self.facts.new_space_is_zero;
        self.with(|content| {
            if poisoned { content.poison(range) } else { content.punch(range.at().0, range.end().0, false) }
        });
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|content| content.set_len(len));
        Ok(())
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        self.with(|content| {
            if at.0 >= content.len {
                return Err(io::Error::from_raw_os_error(libc::ENXIO));
            }
            let first = at.0 / BLOCK_LEN as u64;
            let hole = content.is_hole(first);
            let others = first + 1..content.len.div_ceil(BLOCK_LEN as u64);
            let end = others.take_while(|index| content.is_hole(*index) == hole).last().unwrap_or(first) + 1;
            Ok(Run { len: (end * BLOCK_LEN as u64).min(content.len) - at.0, hole })
        })
    }

    fn prefetch(&self, _range: HostRange) -> io::Result<()> {
        Ok(())
    }

    fn submit(self: Arc<Self>, _operations: &mut Vec<Operation>, _queue: &Arc<Queue>) {
        panic!("scenes carry their pieces out themselves");
    }

    fn close(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What a file holds, for the checker and the reader.
pub struct FileBytes {
    /// Up to where something was written.
    used: Vec<u8>,
    len: u64,
    unused: u8,
}

impl Bytes for FileBytes {
    fn length(&self) -> u64 {
        self.len
    }

    fn fill(&self, buf: &mut [u8], at: u64) {
        let there = buf.len().min(self.len.saturating_sub(at) as usize);
        let used = self.used.get(at as usize..).unwrap_or_default();
        let used = &used[..used.len().min(there)];
        buf[..used.len()].copy_from_slice(used);
        buf[used.len()..there].fill(self.unused);
        buf[there..].fill(0);
    }
}

/// It does what the memory file does that the other tests have, over blocks' edges, cuts and holes.
#[test]
fn a_scene_file_does_what_a_file_does() {
    let seed = Random::seed("a_scene_file_does_what_a_file_does");
    let scene = Arc::new(Scene::empty("empty", "refcount_bits=16"));
    // Only for the atomics of both: there is one thread.
    let runner = Runner::new(RandomScheduler::new(1), shuttle_scenarios::config());
    runner.run(move || compare_with_a_file(&scene, Random::new(seed)));
}

fn compare_with_a_file(scene: &Arc<Scene>, mut random: Random) {
    for poisoned in [true, false].repeat(20) {
        let file = MemoryStorage::with(MemoryOptions { len: 0, grows: true, poisoned }).unwrap();
        file.pwrite(&scene.image, HostOffset(0), Durability::Later).unwrap();
        let original = Original::image(scene);
        let ours = if poisoned { SceneFile::poisoned(original) } else { SceneFile::zeroed(original) };
        for number in 0..200 {
            let at = random.below(9 * 4096);
            // Half of the time at a block's edge.
            let at = if random.below(2) == 0 { at } else { at / 4096 * 4096 };
            let len = [1, 64, 512, 4096, 8192, 10_000][random.below(6) as usize];
            let range = HostRange::new(HostOffset(at), len).unwrap();
            let provision = random.pick(&[Provision::Unmap, Provision::Keep, Provision::Allocate]);
            let call = random.below(8);
            let bytes = random.bytes(len);
            let both: [&dyn Storage; 2] = [&*file, &*ours];
            for storage in both {
                match call {
                    0..=2 => storage.pwrite(&bytes, HostOffset(at), Durability::Later).unwrap(),
                    3 => storage.discard(range).unwrap(),
                    4 => storage.set_len(at).unwrap(),
                    5 => storage.set_len(storage.len().unwrap() + len).unwrap(),
                    _ => storage.zero(range, provision, true).unwrap(),
                }
            }
            assert_same(both, &ours.bytes(), &format!("{poisoned} {number}: {call} at {at}, {len}"));
        }
        ours.set_len(16 * 4096).unwrap();
        ours.zero(HostRange::new(HostOffset(4096), 8192).unwrap(), Provision::Unmap, true).unwrap();
        assert!(ours.run_at(HostOffset(4096)).unwrap().hole, "whole blocks are no hole");
    }
}

/// Both read the same, and what ours calls a hole reads as zeroes. Of blocks that were touched in part the two may
/// differ in whether they are holes, as file systems do.
fn assert_same(storages: [&dyn Storage; 2], flat: &FileBytes, what: &str) {
    let [theirs, ours] = storages.map(|storage| {
        let mut bytes = vec![1; storage.len().unwrap() as usize + 10];
        let got = storage.pread(&mut bytes, HostOffset(0)).unwrap();
        bytes.truncate(got);
        bytes
    });
    assert!(ours == theirs, "{what}");
    let mut at = 0;
    while at < ours.len() {
        let run = storages[1].run_at(HostOffset(at as u64)).unwrap();
        let end = at + run.len as usize;
        assert!(!run.hole || ours[at..end].iter().all(|byte| *byte == 0), "{what}: no hole at {at}");
        at = end;
    }
    let mut bytes = vec![1; ours.len()];
    flat.fill(&mut bytes, 0);
    assert!(bytes == ours && flat.length() == ours.len() as u64, "{what}");
}
