//! Users and groups by name, as chown(1) writes them. The names are the system's: its user database is asked.

use std::ffi::CString;
use std::fmt;
use std::str::FromStr;

use rustix::fs::{Gid, Uid};

/// Room for one entry of the user database at first, and at most: groups list all their members. Our choice.
const ENTRY_LEN: usize = 4096;
const ENTRY_LEN_MAX: usize = 16 << 20;

/// Whom a file is given to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Its user, if that is to change.
    pub user: Option<Uid>,
    /// Its group, if that is to change.
    pub group: Option<Gid>,
}

/// Why a text names nobody.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseOwnerError(String);

impl fmt::Display for ParseOwnerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ParseOwnerError {}

impl FromStr for Owner {
    type Err = ParseOwnerError;

    fn from_str(text: &str) -> Result<Owner, ParseOwnerError> {
        let (user, group) = text.split_once(':').unwrap_or((text, ""));
        let given = |text: &str| !text.is_empty();
        if !given(user) && !given(group) {
            return Err(ParseOwnerError("it is written USER, USER:GROUP or :GROUP".to_owned()));
        }
        let user = Some(user).filter(|user| given(user)).map(user_id).transpose()?;
        let group = Some(group).filter(|group| given(group)).map(group_id).transpose()?;
        Ok(Owner { user, group })
    }
}

fn user_id(text: &str) -> Result<Uid, ParseOwnerError> {
    match id("user", text, |name| by_name(name, getpwnam, |entry| entry.pw_uid))? {
        u32::MAX => Err(ParseOwnerError("there is no such user id".to_owned())),
        id => Ok(Uid::from_raw(id)),
    }
}

fn group_id(text: &str) -> Result<Gid, ParseOwnerError> {
    match id("group", text, |name| by_name(name, getgrnam, |entry| entry.gr_gid))? {
        u32::MAX => Err(ParseOwnerError("there is no such group id".to_owned())),
        id => Ok(Gid::from_raw(id)),
    }
}

/// A name wins over a number, as with chown(1).
fn id(
    what: &str,
    text: &str,
    look_up: impl Fn(&CString) -> Result<Option<u32>, i32>,
) -> Result<u32, ParseOwnerError> {
    let fail = |why: String| ParseOwnerError(format!("{what} {text:?}: {why}"));
    let name = CString::new(text).map_err(|_| fail("a name has no zero byte".to_owned()))?;
    match look_up(&name) {
        Ok(Some(id)) => Ok(id),
        found => text.parse().map_err(|_| {
            fail(match found {
                Err(errno) => std::io::Error::from_raw_os_error(errno).to_string(),
                Ok(_) => format!("this machine knows no such {what}"),
            })
        }),
    }
}

/// One of getpwnam_r(3) and getgrnam_r(3): entry, room for its strings, and where the pointer to the entry goes.
type Ask<Entry> = fn(&CString, &mut Entry, &mut [libc::c_char], &mut *mut Entry) -> i32;

fn getpwnam(
    name: &CString,
    entry: &mut libc::passwd,
    room: &mut [libc::c_char],
    found: &mut *mut libc::passwd,
) -> i32 {
    // SAFETY: all four are valid for the call, and the length is the room's.
    unsafe { libc::getpwnam_r(name.as_ptr(), entry, room.as_mut_ptr(), room.len(), found) }
}

fn getgrnam(
    name: &CString,
    entry: &mut libc::group,
    room: &mut [libc::c_char],
    found: &mut *mut libc::group,
) -> i32 {
    // SAFETY: as above.
    unsafe { libc::getgrnam_r(name.as_ptr(), entry, room.as_mut_ptr(), room.len(), found) }
}

/// The number of the entry of this name, if there is one; or the error number.
fn by_name<Entry: Plain>(
    name: &CString,
    ask: Ask<Entry>,
    number: fn(&Entry) -> u32,
) -> Result<Option<u32>, i32> {
    let mut room = vec![0; ENTRY_LEN];
    loop {
        let mut entry = Entry::zeroed();
        let mut found = std::ptr::null_mut();
        match ask(name, &mut entry, &mut room, &mut found) {
            libc::ERANGE if room.len() < ENTRY_LEN_MAX => room.resize(room.len() * 4, 0),
            0 => return Ok((!found.is_null()).then(|| number(&entry))),
            // What some databases say of a name that they do not know (getpwnam(3)).
            libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM => return Ok(None),
            errno => return Err(errno),
        }
    }
}

/// Entries that may be all zero before they are filled.
trait Plain {
    fn zeroed() -> Self;
}

impl Plain for libc::passwd {
    fn zeroed() -> Self {
        // SAFETY: numbers and pointers, for which zero is a value.
        unsafe { std::mem::zeroed() }
    }
}

impl Plain for libc::group {
    fn zeroed() -> Self {
        // SAFETY: as above.
        unsafe { std::mem::zeroed() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(text: &str) -> (Option<u32>, Option<u32>) {
        let owner: Owner = text.parse().unwrap();
        (owner.user.map(Uid::as_raw), owner.group.map(Gid::as_raw))
    }

    #[test]
    fn names_and_numbers() {
        for (text, want) in [
            ("root", (Some(0), None)),
            ("root:root", (Some(0), Some(0))),
            ("root:", (Some(0), None)),
            (":root", (None, Some(0))),
            ("54321:65432", (Some(54321), Some(65432))),
            (":12", (None, Some(12))),
        ] {
            assert_eq!(owner(text), want, "{text}");
        }
    }

    #[test]
    fn mistakes_are_told_apart() {
        for (text, hint) in [
            ("", "USER:GROUP"),
            (":", "USER:GROUP"),
            ("no-such-user-here", "user \"no-such-user-here\": this machine knows no such user"),
            ("root:no-such-group", "knows no such group"),
            ("-1", "no such user"),
            ("4294967295", "no such user id"),
            ("a\0b", "zero byte"),
        ] {
            let error = text.parse::<Owner>().unwrap_err().to_string();
            assert!(error.contains(hint), "{text:?}: {error}");
        }
    }
}
