//! `--fork`: the process that was started waits until its child listens, and tells with its status whether it does.
//!
//! This is the one place that forks, which is only right while there is a single thread.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, setsid, waitpid};

/// The two processes after a fork.
#[derive(Debug)]
pub enum Process {
    /// The child. A line written to this descriptor lets the parent go.
    Child(OwnedFd),
    /// The parent, once it knows what became of the child: `None` if it listens, else the status that it ended with.
    Parent(Option<u8>),
}

/// Splits the process. Must be called before it has started any thread.
pub fn split() -> io::Result<Process> {
    let (ready, tell) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: there is only this thread, so the child has all of the memory in a state that its thread left it in.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(ready);
            setsid()?;
            Ok(Process::Child(tell))
        }
        child => {
            drop(tell);
            wait_for(File::from(ready), Pid::from_raw(child)).map(Process::Parent)
        }
    }
}

/// Waits until the child says that it listens, or ends.
fn wait_for(mut ready: File, child: Option<Pid>) -> io::Result<Option<u8>> {
    let mut line = [0_u8; 1];
    if ready.read(&mut line)? > 0 {
        return Ok(None);
    }
    let failed = Some(1);
    let Some((_, status)) = waitpid(child, WaitOptions::empty())? else { return Ok(failed) };
    Ok(status.exit_status().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).or(failed))
}
