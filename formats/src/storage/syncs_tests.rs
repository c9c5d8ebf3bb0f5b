//! Tests of [`super`]: what succeeds beside something that fails.

#[cfg(not(shuttle))]
mod threads {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::super::*;
    use crate::sync::thread;

    /// How long the one that fails stays under way for the other to succeed before it, if it is let.
    const HEAD_START: Duration = Duration::from_millis(300);

    fn eio() -> io::Error {
        io::Error::from_raw_os_error(libc::EIO)
    }

    /// As a file that is told that bytes were lost.
    fn told(syncs: &Syncs) -> io::Result<()> {
        syncs.fail();
        Err(eio())
    }

    fn wait_until(condition: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < end, "it does not come to that");
            thread::yield_now();
        }
    }

    type Call = fn(&Syncs, &mut dyn FnMut() -> io::Result<()>) -> io::Result<()>;

    fn sync(syncs: &Syncs, run: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        syncs.sync(run)
    }

    fn write(syncs: &Syncs, run: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        syncs.write(run)
    }

    /// Two at the same time; the kernel gives the error to the one that began first, and success to the other.
    fn two_at_once(call: Call) {
        let syncs = &Syncs::default();
        let (begun, has_begun) = mpsc::channel();
        let (ended, has_ended) = mpsc::channel();
        thread::scope(|scope| {
            let first = scope.spawn(move || {
                call(syncs, &mut || {
                    begun.send(()).unwrap();
                    let _ = has_ended.recv_timeout(HEAD_START);
                    told(syncs)
                })
            });
            has_begun.recv().unwrap();
            let second = call(syncs, &mut || Ok(()));
            // It does not wait when it has failed already.
            let _ = ended.send(());
            assert_eq!(first.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
            assert_eq!(second.unwrap_err().raw_os_error(), Some(libc::EIO), "its bytes were lost as well");
        });
    }

    #[test]
    fn of_two_syncs_neither_succeeds_when_one_is_told_of_a_loss() {
        two_at_once(sync);
    }

    #[test]
    fn of_two_durable_writes_neither_succeeds_when_one_is_told_of_a_loss() {
        two_at_once(write);
    }

    /// Whatever is under way when the file fails.
    #[test]
    fn a_sync_does_not_succeed_after_a_durable_write_has_failed_and_the_other_way_round() {
        for (outer, inner) in [(sync as Call, write as Call), (write, sync)] {
            let syncs = Syncs::default();
            let result = outer(&syncs, &mut || {
                inner(&syncs, &mut || told(&syncs)).unwrap_err();
                Ok(())
            });
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO));
        }
    }

    #[test]
    fn who_comes_during_a_run_shares_the_next_one() {
        const OTHERS: usize = 8;
        let syncs = &Syncs::default();
        let runs = &crate::sync::atomic::AtomicUsize::new(0);
        let (begun, has_begun) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let first = scope.spawn(move || {
                syncs.sync(|| {
                    begun.send(()).unwrap();
                    may_go.recv().unwrap();
                    Ok(())
                })
            });
            has_begun.recv().unwrap();
            let others = [(); OTHERS].map(|()| {
                scope.spawn(move || {
                    syncs.sync(|| {
                        runs.fetch_add(1, Ordering::SeqCst);
                        // Not final: only who shares it fails.
                        Err(io::Error::from_raw_os_error(libc::ENOSPC))
                    })
                })
            });
            wait_until(|| syncs.runs.lock().waiting == OTHERS);
            assert_eq!(runs.load(Ordering::SeqCst), 0, "one at a time");
            go.send(()).unwrap();
            first.join().unwrap().unwrap();
            for other in others {
                assert_eq!(other.join().unwrap().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            }
        });
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        syncs.sync(|| Ok(())).unwrap();
    }

    #[test]
    fn durable_writes_run_beside_each_other_and_wait_only_for_earlier_ones() {
        let syncs = &Syncs::default();
        let (begun, has_begun) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let slow = scope.spawn(move || {
                syncs.write(|| {
                    begun.send(()).unwrap();
                    may_go.recv().unwrap();
                    Ok(())
                })
            });
            has_begun.recv().unwrap();
            let fast = scope.spawn(move || syncs.write(|| Ok(())));
            wait_until(|| syncs.writes.lock().begun == 2 && syncs.writes.lock().under_way == [0]);
            assert!(!fast.is_finished(), "the first may have been told in its place");
            go.send(()).unwrap();
            slow.join().unwrap().unwrap();
            fast.join().unwrap().unwrap();
        });
        // One that begins later is nobody's concern.
        let end = syncs.begin_write();
        drop(end);
        syncs.wait_for_writes();
        assert!(syncs.writes.lock().under_way.is_empty());
    }

    #[test]
    fn a_panic_is_a_failure_and_holds_nobody_up() {
        let syncs = Syncs::default();
        for call in [sync as Call, write as Call] {
            let panics = || call(&syncs, &mut || panic!("the panic of this test"));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
            assert!(call(&syncs, &mut || Ok(())).is_ok());
        }
        assert_eq!(syncs.runs.lock().failure, Some((1, libc::EIO)));
    }
}

#[cfg(shuttle)]
mod interleavings {
    use super::super::*;
    use crate::sync::{Arc, thread};

    /// A file whose written bytes are lost by and by, and which says so once for each description.
    #[derive(Default)]
    struct File {
        syncs: Syncs,
        /// Whether bytes were lost that a description has not been told of: that of the syncs, that of the writes.
        untold: [Mutex<bool>; 2],
        lost: AtomicBool,
    }

    impl File {
        fn call(&self, description: usize) -> io::Result<()> {
            thread::yield_now();
            let told = std::mem::take(&mut *self.untold[description].lock());
            thread::yield_now();
            if told {
                self.syncs.fail();
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(())
        }

        /// Its result is of use only if nothing was lost before it began.
        fn check(&self, description: usize) {
            let lost = self.lost.load(Ordering::SeqCst);
            let result = match description {
                0 => self.syncs.sync(|| self.call(0)),
                _ => self.syncs.write(|| self.call(1)),
            };
            assert!(!(lost && result.is_ok()), "success for lost bytes");
        }
    }

    #[test]
    fn nobody_succeeds_whose_bytes_were_lost_before() {
        let scene = || {
            let file = Arc::new(File::default());
            let threads = [0, 0, 0, 1, 1].map(|description| {
                let file = Arc::clone(&file);
                thread::spawn(move || file.check(description))
            });
            for untold in &file.untold {
                *untold.lock() = true;
            }
            file.lost.store(true, Ordering::SeqCst);
            for thread in threads {
                assert!(thread.join().is_ok());
            }
            assert!(file.syncs.sync(|| file.call(0)).is_err());
        };
        shuttle::check_random(scene, 2000);
        shuttle::check_pct(scene, 2000, 3);
    }
}
