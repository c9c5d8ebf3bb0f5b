//! One script of changes under one fault: what the caller, the guest and the file are to see of it.

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{CallClass, Fault, Faults, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, Error, State};

use super::support::checker;
use super::support::random::Random;
use super::support::scene::{CLUSTER, Scene, Storages, open_parts};
use super::support::steps::{Action, Kind, Step};
use super::support::units::{Journal, Writer, painted};
use super::support::warned::Warned;
use super::support::wrapped::{NeverClosed, Wrapped};

/// The classes of calls that fail.
pub const CLASSES: [CallClass; 9] = {
    use CallClass::*;
    [Write, Sync, Read, Zero, SetLen, Discard, Len, TryRead, RunAt]
};

/// A script under a fault.
pub struct Trial<'a> {
    scene: &'a Scene,
    steps: &'a [Step],
    fault: Option<Fault>,
    faults: Arc<Faults>,
    memory: Storages,
    /// What the guest reads while the image is live: a step that has succeeded is there.
    live: Journal,
    /// What is in the file at the worst: only what was flushed is there.
    disk: Journal,
    time: usize,
    /// Steps that failed, with their errors.
    failed: Vec<(Step, Error)>,
    /// Whether the fault struck outside of a flush, a FUA write or a close.
    outside_commit: bool,
    /// Behind each step a cluster is read, all over the disk.
    reads: bool,
    /// A reader has seen the fault.
    read_failed: bool,
}

impl<'a> Trial<'a> {
    pub fn new(scene: &'a Scene, steps: &'a [Step], fault: Option<Fault>) -> Self {
        Trial {
            scene,
            steps,
            fault,
            faults: Faults::new(),
            memory: scene.storages(&scene.files()),
            live: Journal::new(&scene.content),
            disk: Journal::new(&scene.content),
            time: 1,
            failed: Vec::new(),
            outside_commit: false,
            reads: steps.len().is_multiple_of(2),
            read_failed: false,
        }
    }

    fn name(&self) -> String {
        let (scene, fault) = (self.scene.name, self.fault);
        let steps: Vec<_> = self.steps.iter().map(|step| format!("\n  {step:?}")).collect();
        let failed: Vec<_> = self.failed.iter().map(|(step, e)| format!("\n  {step:?}: {e}")).collect();
        format!("scene '{scene}', {}\n{fault:?}, failed {}\n", steps.concat(), failed.concat())
    }

    /// Runs it all; returns how many calls of each class there were.
    pub fn run(mut self) -> [u64; CLASSES.len()] {
        let warned = Warned::of("bits of dirty bitmaps could not be stored yet");
        let attach = |memory| -> Arc<dyn Storage> { self.faults.attach(Wrapped::new(memory, NeverClosed)) };
        let image = attach(self.memory.image.clone());
        let data = self.memory.data.clone().map(|data| attach(data));
        let backing = self.scene.backing_storage().map(|backing| -> Arc<dyn BlockDriver> {
            RawDriver::open(attach(backing), RawOptions::default()).unwrap()
        });
        let driver = open_parts(image, data, backing, Some(self.scene.write_options()), 0).unwrap();
        let before = CLASSES.map(|class| self.faults.count(class));
        if let Some(fault) = self.fault {
            self.faults.arm(fault);
        }
        for number in 0..self.steps.len() {
            self.step(&*driver, self.steps[number], number as Writer + 1);
            if self.reads {
                self.read_elsewhere(&*driver, number as u64);
            }
        }
        let counts = CLASSES.map(|class| self.faults.count(class));
        let fired = self.faults.fired();
        self.faults.disarm();
        self.check_seen(fired, warned.heard());
        let state = driver.state();
        match state {
            State::Live => self.after_live(&*driver),
            State::Failed => self.after_failed(&*driver),
            State::Closed => panic!("{}: closed", self.name()),
        }
        self.check_file(state, driver.close().is_ok());
        std::array::from_fn(|class| counts[class] - before[class])
    }

    fn step(&mut self, driver: &dyn BlockDriver, step: Step, writer: Writer) {
        self.time += 1;
        let fired = self.faults.fired();
        let began = self.time;
        let flush = step.action == Action::Flush;
        let writer = if matches!(step.action, Action::Write(_)) { writer } else { 0 };
        let changes = (!flush).then(|| {
            let units = step.units();
            let live = self.live.begin(units.start, units.end, writer, began);
            (live, self.disk.begin(units.start, units.end, writer, began))
        });
        let outcome = step.carry_out(driver, writer);
        self.time += 1;
        if self.faults.fired() > fired && !flush && !step.is_fua() {
            self.outside_commit |= fired == 0;
        }
        match outcome {
            Err(error) => self.failed.push((step, error)),
            Ok(()) if flush => {
                self.disk.flushed(began, self.time);
                self.live.flushed(began, self.time);
            }
            // What a discard leaves is the image's choice.
            Ok(()) if step.action == Action::Discard => {}
            Ok(()) => {
                let (live, disk) = changes.unwrap();
                self.live.end(live, self.time, true);
                self.disk.end(disk, self.time, step.is_fua());
            }
        }
    }

    /// Reads a cluster that the steps hardly know, so that tables are loaded for readers, too. Whether what is read is right
    /// is looked at when no fault is left.
    fn read_elsewhere(&mut self, driver: &dyn BlockDriver, number: u64) {
        let cluster = (17 + 61 * number) % (driver.size() / CLUSTER);
        let fired = self.faults.fired();
        if let Err(error) = driver.pread(cluster * CLUSTER, &mut [0; CLUSTER as usize]) {
            let fault = self.fault.unwrap_or_else(|| panic!("{}: {error}", self.name()));
            let errno = error.errno();
            assert!(errno == fault.errno || errno == libc::EIO, "{}: errno {errno}", self.name());
            self.read_failed = true;
        } else {
            let of_read = self.fault.is_some_and(|fault| fault.class == Some(CallClass::Read));
            assert!(!of_read || self.faults.fired() == fired, "{}: a reader was told nothing", self.name());
        }
    }

    /// Whoever asked has seen the fault, with its errno or as EIO.
    fn check_seen(&self, fired: u64, warned: bool) {
        let Some(fault) = self.fault else {
            return assert!(self.failed.is_empty(), "{}", self.name());
        };
        for errno in self.failed.iter().map(|(_, error)| error.errno()) {
            assert!(errno == fault.errno || errno == libc::EIO, "{}: errno {errno}", self.name());
        }
        // What could not be let go, or stored of bits, is for later; something else may have ended a lack of room.
        let quiet = match fault.class {
            Some(class) if class != CallClass::Sync && warned => true,
            // Where holes are, and what is in memory, makes it only quicker to know.
            Some(CallClass::Discard | CallClass::Len | CallClass::RunAt | CallClass::TryRead) => true,
            Some(CallClass::Zero) => !self.outside_commit,
            Some(CallClass::Read) => !self.outside_commit || fault.errno == libc::ENOSPC && !fault.sticky,
            Some(CallClass::SetLen) => fault.errno == libc::ENOSPC,
            Some(CallClass::Write) => fault.errno == libc::ENOSPC && !fault.sticky,
            _ => false,
        };
        let seen = self.read_failed || !self.failed.is_empty();
        assert!(fired == 0 || quiet || seen, "{}: not seen", self.name());
    }

    /// A later write works, and so does all else.
    fn after_live(&mut self, driver: &dyn BlockDriver) {
        let of_sync = self.fault.is_some_and(|fault| fault.class == Some(CallClass::Sync));
        assert!(!of_sync || self.failed.is_empty());
        self.read_and_check(driver, true);
        let again = [Kind::WriteShared, Kind::WritePart, Kind::Grow, Kind::Flush];
        let mut random = Random::new(7);
        for kind in again {
            let failed = self.failed.len();
            self.step(driver, Step::random(kind, &mut random), 500);
            assert!(self.failed.len() == failed, "{}: the fault has gone", self.name());
        }
        self.read_and_check(driver, true);
    }

    /// Nothing can be written any more, and what was committed can be read.
    fn after_failed(&mut self, driver: &dyn BlockDriver) {
        let fault = self.fault.unwrap();
        // A write that is to be durable by itself has a sync in it.
        let sync = fault.class == Some(CallClass::Sync) || self.failed.iter().any(|(step, _)| step.is_fua());
        assert!(sync, "{}: failed for good by something else than a sync", self.name());
        for outcome in [driver.pwrite(0, &[1; 512], Durability::Later), driver.flush()] {
            let error = outcome.err().unwrap_or_else(|| panic!("{}: a failed image is written", self.name()));
            assert_eq!(error.errno(), libc::EIO, "{}", self.name());
        }
        self.read_and_check(driver, false);
    }

    /// Cluster by cluster, as some may be unreadable in a failed image.
    fn read_and_check(&self, driver: &dyn BlockDriver, live: bool) {
        let journal = if live { &self.live } else { &self.disk };
        let mut content = vec![0; driver.size() as usize];
        for (number, cluster) in content.chunks_mut(CLUSTER as usize).enumerate() {
            match driver.pread(number as u64 * CLUSTER, cluster) {
                Ok(()) => {}
                Err(error) => {
                    let span = self.scene.table_span();
                    let table = (number as u64 * CLUSTER / span) as usize;
                    let touched = self.steps.iter().any(|step| step.touches(table, span));
                    assert!(!live && touched, "{}: cluster {number}: {error}", self.name());
                    cluster.copy_from_slice(&self.disk.any_allowed(number as u64 * CLUSTER, CLUSTER));
                }
            }
        }
        journal.check(&content, usize::MAX).unwrap_or_else(|what| panic!("{}: {what}", self.name()));
    }

    /// The file is sound, holds what it must, and can be opened and written again.
    fn check_file(&self, state: State, closed: bool) {
        let memory: Arc<dyn Storage> = self.memory.image.clone();
        let data: Arc<dyn Storage> = match &self.memory.data {
            Some(data) => data.clone(),
            None => memory.clone(),
        };
        let report = checker::check_storage(&*memory).unwrap();
        assert!(report.is_sound(), "{}: closed {closed}\n{report}", self.name());
        let content = self.scene.read_files(&&*memory, &&*data);
        let content = content.unwrap_or_else(|what| panic!("{}: {what}", self.name()));
        let raw =
            self.scene.read_raw(&&*memory, &&*data).unwrap_or_else(|what| panic!("{}: {what}", self.name()));
        let journal = if state == State::Live && closed { &self.live } else { &self.disk };
        journal
            .check(&content, usize::MAX)
            .unwrap_or_else(|what| panic!("{}: in the file: {what}", self.name()));
        if let Some(raw) = raw {
            // A write that failed has perhaps reached it, and is not to be seen through the image.
            let journal = if self.failed.is_empty() { journal } else { &self.disk };
            journal
                .check(&raw, usize::MAX)
                .unwrap_or_else(|what| panic!("{}: in the raw data file: {what}", self.name()));
        }
        assert!(state != State::Live || closed, "{}: close failed", self.name());
        let told = self.scene.check_bitmaps(&&*memory, &content);
        told.unwrap_or_else(|what| panic!("{}: in the file: {what}", self.name()));
        if self.fault.is_none() {
            assert!(report.is_clean(), "{}: {report}", self.name());
        }
        let again =
            self.memory.data.clone().map(|data| -> Arc<dyn Storage> { Wrapped::new(data, NeverClosed) });
        let driver = self.scene.open_files(Wrapped::new(memory.clone(), NeverClosed), again).unwrap();
        driver.pwrite(130 * CLUSTER, &painted(130 * CLUSTER, 2 * CLUSTER, 600), Durability::Fua).unwrap();
        driver.pwrite(64, &painted(64, 64, 600), Durability::Later).unwrap();
        driver.close().unwrap();
        let report = checker::check_storage(&*memory).unwrap();
        assert!(report.is_sound(), "{}: written again\n{report}", self.name());
    }
}

/// Every way in which call `call` of a class can fail.
pub fn ways(class: CallClass, call: u64) -> Vec<Fault> {
    let once = Fault { class: Some(class), ..Fault::at(call) };
    let mut ways = vec![once, Fault { sticky: true, ..once }];
    // A sync, too: some file systems find out only then that there is no room for what was written. And a read, for nothing
    // says that a file system only ever has such an error for who writes.
    if !matches!(class, CallClass::Len | CallClass::TryRead | CallClass::RunAt) {
        let full = Fault { errno: libc::ENOSPC, ..once };
        ways.extend([full, Fault { sticky: true, ..full }]);
    }
    if class == CallClass::Write {
        // Whole units: what is torn inside of one cannot be told from another's.
        for (written_len, errno) in [(128, libc::EIO), (512, libc::EIO), (512, libc::ENOSPC)] {
            let short = Fault { written_len, errno, ..once };
            ways.extend([short, Fault { sticky: true, ..short }]);
        }
    }
    ways
}
