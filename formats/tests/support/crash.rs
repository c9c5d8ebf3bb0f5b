//! Runs sequences over a recording storage, and looks at what a crash at any moment may leave.

use std::cell::RefCell;

use nbd_img_formats::qcow2::Qcow2Driver;
use nbd_img_formats::storage::{Change, Fate, FileId, Log, SparseBytes, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, HostOffset};

use super::checker;
use super::image::Image;
use super::maker::Maker;
use super::qemu_io::QemuIo;
use super::random::Random;
use super::scene::{CLUSTER, Files, Scene};
use super::steps::{Action, Step, read_all};
use super::units::{Journal, UNIT_LEN, Writer, writer_of};

/// The image file.
pub const IMAGE: FileId = FileId(0);
/// Its external data file.
pub const DATA: FileId = FileId(1);

/// One state in so many is also given to `qemu-img check`, and to qemu-io to read it and to write on.
const QEMU_ONE_IN: u64 = 100;
/// So much of the disk is read by qemu-io.
const QEMU_READ_LEN: usize = 256 << 10;
/// One state in so many is opened again and written.
const REOPEN_ONE_IN: u64 = 50;

/// What lies between the driver and the recording storage of a file.
pub type Between<'a> = &'a dyn Fn(FileId, Arc<dyn Storage>) -> Arc<dyn Storage>;

/// A sequence that has been carried out.
pub struct Run<'a> {
    pub scene: &'a Scene,
    pub steps: Vec<Step>,
    pub log: Arc<Log>,
    pub journal: Journal,
    /// Whether the syncs of each flush are counted.
    pub count_syncs: bool,
}

/// Carries `steps` out on a copy of the scene, and then flushes and closes.
pub fn run<'a>(scene: &'a Scene, steps: Vec<Step>, between: Between<'_>) -> Run<'a> {
    run_with(scene, steps, between, true)
}

/// The same, whatever number of syncs reaches the recording.
pub fn run_without_sync_counts<'a>(scene: &'a Scene, steps: Vec<Step>, between: Between<'_>) -> Run<'a> {
    run_with(scene, steps, between, false)
}

fn run_with<'a>(scene: &'a Scene, steps: Vec<Step>, between: Between<'_>, count_syncs: bool) -> Run<'a> {
    let log = Log::new();
    let driver = open_recorded(scene, &log, between);
    let mut run = Run { scene, steps, log, journal: Journal::new(&scene.content), count_syncs };
    for number in 0..run.steps.len() {
        run.step(&*driver, number);
    }
    let flush = Step { action: Action::Flush, at: 0, len: 0, by_plan: false };
    run.flush(&*driver, flush);
    let content = read_all(&*driver).unwrap();
    if content != run.journal.now() {
        panic!(
            "{}: the driver reads what nobody wrote: {:?}",
            run.name(),
            run.journal.check(&content, usize::MAX)
        );
    }
    driver.close().unwrap();
    run.check_end();
    run
}

/// Opens a copy of the scene's files, whose changes go into `log`.
pub fn open_recorded(scene: &Scene, log: &Arc<Log>, between: Between<'_>) -> Arc<Qcow2Driver> {
    let storages = scene.storages(&scene.files());
    let image = between(IMAGE, log.attach(storages.image).unwrap());
    let data = storages.data.map(|data| between(DATA, log.attach(data).unwrap()));
    scene.open_files(image, data).unwrap()
}

/// What a crash has left of an image's files.
pub struct Left {
    pub image: SparseBytes,
    data: Option<SparseBytes>,
}

impl Left {
    /// What there is of each file of the scene.
    pub fn of(scene: &Scene, mut bytes_of: impl FnMut(FileId) -> SparseBytes) -> Left {
        Left { image: bytes_of(IMAGE), data: scene.data.is_some().then(|| bytes_of(DATA)) }
    }

    /// Where the data is.
    pub fn data(&self) -> &SparseBytes {
        self.data.as_ref().unwrap_or(&self.image)
    }

    /// What is on the disk. `at_rest`: a raw data file has to be the same.
    pub fn read(&self, scene: &Scene, at_rest: bool) -> Result<Vec<u8>, String> {
        let content = scene.read_files(&self.image, self.data())?;
        if at_rest && Image::parse(&self.image)?.has_raw_data_file() {
            let mut raw = vec![0; content.len()];
            self.data().read(&mut raw, 0);
            if self.data().len() < content.len() as u64 || raw != content {
                return Err(format!("{}: the raw data file is not the disk", scene.name));
            }
        }
        Ok(content)
    }

    /// All bytes.
    pub fn files(&self) -> Files {
        Files { image: content_of(&self.image), data: self.data.as_ref().map(content_of) }
    }
}

impl Run<'_> {
    fn name(&self) -> String {
        let steps: Vec<_> = self.steps.iter().map(|step| format!("\n  {step:?}")).collect();
        format!("scene '{}', {}\n", self.scene.name, steps.concat())
    }

    fn step(&mut self, driver: &dyn BlockDriver, number: usize) {
        let step = self.steps[number];
        if step.action == Action::Flush {
            return self.flush(driver, step);
        }
        let writer = match step.action {
            Action::Write(_) => number as Writer + 1,
            Action::Zero(_) | Action::Discard | Action::Flush => 0,
        };
        let before = (step.action == Action::Discard).then(|| read_all(driver).unwrap());
        let change = self.journal.begin(step.units().start, step.units().end, writer, self.log.len());
        let outcome = step.carry_out(driver, writer);
        outcome.unwrap_or_else(|e| panic!("{}: step {number} failed: {e}", self.name()));
        self.journal.end(change, self.log.len(), step.is_fua());
        if let Some(before) = before {
            self.after_discard(driver, step, change, &before);
        }
    }

    /// What a discard did to each unit is the image's choice: nothing, or zeroes.
    fn after_discard(&mut self, driver: &dyn BlockDriver, step: Step, change: usize, before: &[u8]) {
        let now = read_all(driver).unwrap();
        for number in step.units() {
            let range = number * UNIT_LEN..(number + 1) * UNIT_LEN;
            if now[range.clone()] == before[range.clone()] {
                self.journal.take_back(change, number);
            } else {
                assert_eq!(
                    writer_of(&now[range], number),
                    Some(0),
                    "{}: unit {number} discarded",
                    self.name()
                );
            }
        }
    }

    fn flush(&mut self, driver: &dyn BlockDriver, step: Step) {
        let began = self.log.len();
        let outcome = step.carry_out(driver, 0);
        outcome.unwrap_or_else(|e| panic!("{}: a flush failed: {e}", self.name()));
        self.journal.flushed(began, self.log.len());
        if self.count_syncs {
            self.check_syncs(began);
        }
    }

    /// One sync when nothing but data or refcounts was written, two with metadata, three when the refcount
    /// table or the header changed.
    fn check_syncs(&self, began: usize) {
        let records = self.log.records().split_off(began);
        let of = |file| records.iter().filter(move |record| record.file == file);
        let syncs = of(IMAGE).filter(|record| record.change == Change::Sync).count();
        let writes = of(IMAGE).any(|record| matches!(record.change, Change::Write { .. }));
        let data_syncs = of(DATA).filter(|record| record.change == Change::Sync).count();
        assert_eq!(data_syncs, usize::from(self.scene.data.is_some()), "{}: syncs of data", self.name());
        let allowed = match (syncs, writes) {
            (0, false) => self.scene.data.is_some(),
            (1, writes) => !writes || self.only_counts_written(began),
            (2, writes) => writes,
            (3, _) => self.table_changed(began),
            _ => false,
        };
        let said: Vec<_> = records.iter().map(|record| describe(&record.change)).collect();
        assert!(allowed, "{}: {syncs} syncs in a flush: {said:#?}", self.name());
    }

    /// Whether nothing but refcount blocks was written: counts of clusters that are not used any more need
    /// no second sync.
    fn only_counts_written(&self, began: usize) -> bool {
        let bytes = self.log.replay(IMAGE, began);
        let image = Image::parse(&bytes).unwrap();
        let (blocks, len) = (&image.refcount_table, image.cluster_len());
        let in_block =
            |at: u64| blocks.iter().any(|block| *block != 0 && (*block..*block + len).contains(&at));
        let records = self.log.records().split_off(began);
        records.iter().filter(|record| record.file == IMAGE).all(|record| match &record.change {
            Change::Write { at, .. } => in_block(at.0),
            Change::Zero { .. }
            | Change::Discard { .. }
            | Change::SetLen(_)
            | Change::Sync
            | Change::Mark(_) => true,
        })
    }

    fn table_changed(&self, began: usize) -> bool {
        let [before, now] = [began, self.log.len()].map(|cut| self.log.replay(IMAGE, cut));
        let [before, now] = [&before, &now].map(|bytes| Image::parse(bytes).unwrap());
        (before.table_at, before.refcount_table) != (now.table_at, now.refcount_table)
    }

    /// After a close nothing is lost either.
    fn check_end(&self) {
        let left = Left::of(self.scene, |file| self.log.replay(file, self.log.len()));
        let report = checker::check(&left.image).unwrap();
        assert!(report.is_clean(), "{}: after a close:\n{report}", self.name());
        let content = self.scene.read_files(&left.image, left.data()).unwrap();
        assert!(content == self.journal.now(), "{}: the closed image has another content", self.name());
        if let Some(raw) = self.scene.read_raw(&left.image, left.data()).unwrap() {
            assert!(raw == content, "{}: the raw data file has another content", self.name());
        }
        self.check_bitmaps_at_end(&Image::parse(&left.image).unwrap());
    }

    /// After a close the enabled bitmap has what it had, what was written, and nothing else.
    fn check_bitmaps_at_end(&self, image: &Image<'_>) {
        let before = Image::parse(&self.scene.image).unwrap();
        for (old, bitmap) in before.bitmaps.iter().zip(&image.bitmaps) {
            let mut expected = before.dirty_granules(old);
            if old.flags == 2 {
                let changes = self.steps.iter().filter(|step| step.action != Action::Flush && step.len > 0);
                for step in changes {
                    let granule = |at: u64| (at >> old.granularity_bits) as usize;
                    expected[granule(step.at)..=granule(step.at + step.len - 1)].fill(true);
                }
            }
            assert_eq!(bitmap.flags, old.flags, "{}: flags of {}", self.name(), old.name);
            assert!(image.dirty_granules(bitmap) == expected, "{}: bits of {}", self.name(), old.name);
        }
    }

    /// Something of the image as it is in the end.
    pub fn image_now<T>(&self, see: impl FnOnce(&Image<'_>) -> T) -> T {
        let bytes = self.log.replay(IMAGE, self.log.len());
        see(&Image::parse(&bytes).unwrap())
    }

    /// The moments at which it can be cut: before the first record, and after each one.
    pub fn cuts(&self) -> u64 {
        self.log.len() as u64 + 1
    }

    /// Looks at `count` states that a crash may have left, spread evenly over the cuts; an error says which
    /// one is wrong, and why.
    pub fn explore(&self, count: u64, random: &mut Random) -> Result<(), String> {
        let first = random.below(self.cuts());
        for number in 0..count {
            let cut = ((first + number * self.cuts() / count) % self.cuts()) as usize;
            let (left, fates) = self.crash(cut, random);
            self.check_state(&left, cut, random).map_err(|what| {
                let records = self.log.records();
                let mut said = format!("{what}\n{}\ncut {cut} of:\n", self.name());
                for (index, record) in records.iter().enumerate().take(cut) {
                    let fate = fates.iter().find(|(number, _)| *number == index).map(|(_, fate)| fate);
                    let (file, change) = (record.file.0, describe(&record.change));
                    said += &format!("  {index} file {file}: {change} {fate:?}\n");
                }
                said
            })?;
        }
        Ok(())
    }

    fn crash(&self, cut: usize, random: &mut Random) -> (Left, Vec<(usize, Fate)>) {
        let mut fates = Vec::new();
        // One file may lose all and the other one nothing.
        let left = Left::of(self.scene, |file| self.crash_file(file, cut, random, &mut fates));
        (left, fates)
    }

    fn crash_file(
        &self,
        file: FileId,
        cut: usize,
        random: &mut Random,
        fates: &mut Vec<(usize, Fate)>,
    ) -> SparseBytes {
        let style = random.below(8);
        self.log.after_crash(file, cut, |number, record| {
            let choice = match style {
                0 => 0,
                1 => 1,
                2 => random.below(2),
                // Nearly all there, or nearly all lost.
                3 => u64::from(random.below(6) == 0),
                4 => u64::from(random.below(6) != 0),
                _ => random.below(4),
            };
            let fate = match choice {
                0 => Fate::Kept,
                1 => Fate::Lost,
                2 => Fate::Prefix(random.below(1 + sectors(&record.change))),
                _ => Fate::Scattered(random.next()),
            };
            fates.push((number, fate));
            fate
        })
    }

    fn check_state(&self, left: &Left, cut: usize, random: &mut Random) -> Result<(), String> {
        let report = checker::check(&left.image)?;
        if !report.is_sound() {
            return Err(format!("the image is corrupt:\n{report}"));
        }
        let content = self.scene.read_files(&left.image, left.data())?;
        self.journal.check(&content, cut)?;
        self.scene.check_bitmaps(&left.image, &content)?;
        if let Some(raw) = self.scene.read_raw(&left.image, left.data())? {
            self.journal.check(&raw, cut).map_err(|what| format!("in the raw data file: {what}"))?;
        }
        if random.below(QEMU_ONE_IN) == 0 {
            let files = left.files();
            let maker = Maker::of_files(&files.image, files.data.as_deref());
            let (code, said) = maker.check();
            if code != report.exit_code() {
                return Err(format!("qemu-img check exits with {code}: {said}\nours:\n{report}"));
            }
            self.qemu_goes_on(&maker, content, random)?;
        }
        if random.below(REOPEN_ONE_IN) == 0 {
            self.write_on(left, random)?;
        }
        Ok(())
    }

    /// QEMU reads the image as we do, and goes on writing it.
    fn qemu_goes_on(&self, maker: &Maker, content: Vec<u8>, random: &mut Random) -> Result<(), String> {
        let backing = maker.file("backing.raw");
        if let Some(below) = &self.scene.backing {
            std::fs::write(&backing, below).unwrap();
        }
        let backing = self.scene.backing.is_some().then_some(&*backing);
        let read_len = content.len().min(QEMU_READ_LEN);
        let mut expected = content;
        let (at, len) = (random.below(150) * CLUSTER, 1 + random.below(20 * CLUSTER));
        let read = with_qemu_io(|qemu| {
            let data = maker.data_path();
            qemu.open_qcow2(&maker.path(), backing, self.scene.data.is_some().then_some(&*data));
            let read = qemu.read(0, read_len);
            let said = qemu.command(&format!("write -q -P 90 {at} {len}"));
            qemu.command("close");
            if said.is_empty() { Ok(read) } else { Err(format!("qemu-io cannot write: {said}")) }
        })?;
        if read != expected[..read_len] {
            return Err("qemu-io reads something else".to_owned());
        }
        expected[at as usize..(at + len) as usize].fill(90);
        let (bytes, data) = (maker.bytes(), maker.data_bytes());
        if self.scene.read_files(&bytes, data.as_ref().unwrap_or(&bytes))? != expected {
            return Err(format!("after qemu-io has written {at} {len} there is something else"));
        }
        let report = checker::check(&bytes)?;
        if report.is_sound() { Ok(()) } else { Err(format!("corrupt after qemu-io has written:\n{report}")) }
    }

    /// The image goes on being written after the crash.
    fn write_on(&self, left: &Left, random: &mut Random) -> Result<(), String> {
        let storages = self.scene.storages(&left.files());
        let data = storages.data.clone().map(|data| data as Arc<dyn Storage>);
        let driver = self.scene.open_files(storages.image.clone(), data);
        let driver = driver.map_err(|e| format!("it cannot be opened again: {e}"))?;
        let mut journal = Journal::new(&self.scene.read_files(&left.image, left.data())?);
        for number in 0..4 {
            let kind = random.pick(&super::steps::KINDS);
            let step = Step::random(kind, random);
            let writer = 1000 + number;
            if matches!(step.action, Action::Write(_)) {
                journal.begin(step.units().start, step.units().end, writer, 0);
                step.carry_out(&*driver, writer).map_err(|e| format!("writing on: {e}"))?;
            }
        }
        driver.flush().map_err(|e| format!("writing on: {e}"))?;
        let disk: &dyn Storage = &*storages.image;
        let data: &dyn Storage = storages.data.as_deref().map_or(disk, |data| data);
        let content = self.scene.read_files(&disk, &data)?;
        self.scene.check_bitmaps(&disk, &content)?;
        if content != journal.now() {
            return Err("what was written after the crash is not there".to_owned());
        }
        let report = checker::check(&disk)?;
        if report.is_sound() { Ok(()) } else { Err(format!("corrupt after writing on:\n{report}")) }
    }
}

/// Each thread keeps one.
fn with_qemu_io<T>(work: impl FnOnce(&mut QemuIo) -> T) -> T {
    thread_local!(static QEMU: RefCell<Option<QemuIo>> = const { RefCell::new(None) });
    QEMU.with_borrow_mut(|qemu| work(qemu.get_or_insert_with(QemuIo::start)))
}

/// All bytes of a file.
pub fn content_of(bytes: &SparseBytes) -> Vec<u8> {
    let mut content = vec![0; bytes.len() as usize];
    bytes.read(&mut content, 0);
    content
}

fn sectors(change: &Change) -> u64 {
    match change {
        Change::Write { bytes, .. } => bytes.len() as u64 / 512 + 1,
        Change::Zero { range, .. } | Change::Discard { range, .. } => range.len() / 512 + 1,
        Change::SetLen(_) | Change::Sync | Change::Mark(_) => 1,
    }
}

fn describe(change: &Change) -> String {
    match change {
        Change::Write { at: HostOffset(at), bytes, durability } => {
            let start: Vec<_> = bytes.iter().take(16).collect();
            format!("write {at:#x} {} {durability:?} {start:x?}", bytes.len())
        }
        Change::Zero { range, grows } => format!("zero {:#x} {} {grows}", range.at().0, range.len()),
        Change::Discard { range, byte } => format!("discard {:#x} {} {byte}", range.at().0, range.len()),
        Change::SetLen(len) => format!("length {len:#x}"),
        Change::Sync => "sync".to_owned(),
        Change::Mark(text) => format!("({text})"),
    }
}
