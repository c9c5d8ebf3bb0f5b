//! What of OpenSSL is used, made safe: either side of TLS with pre-shared keys, from bytes to bytes.
//!
//! OpenSSL gets its input from, and leaves its output in, buffers of ours by a BIO of our own: so nothing in it waits, or
//! touches a socket. All calls of its functions are in this file.

use std::ffi::{CStr, c_char, c_int, c_long, c_uchar, c_uint, c_void};
use std::ptr::{self, NonNull};
use std::sync::{Arc, OnceLock};

use super::library::{self as lib, Bio, BioMethod, OpenSsl, Ssl, SslCtx, openssl};
use super::psk::Keys;

/// What TLS 1.2 may use: ephemeral keys, so that a key that is found out later opens nothing recorded before, and
/// authenticated encryption. TLS 1.3 has nothing else.
const TLS12_CIPHERS: &CStr = c"DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-CHACHA20-POLY1305";

/// What TLS 1.3 may use: pre-shared keys go with SHA-256 (RFC 8446, 4.2.11), and processors compute AES.
const TLS13_CIPHERS: &CStr = c"TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";

/// No group of numbers below 112 bits of strength, whatever the system's default (SSL_CTX_set_security_level's manual).
const SECURITY_LEVEL: c_int = 2;

/// Which side of its connections this program is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Who listens.
    Server,
    /// Who connects.
    Client,
}

/// What every connection of a server, or of a client, shares.
pub struct Context {
    side: Side,
    api: &'static OpenSsl,
    raw: NonNull<SslCtx>,
    bio: BioType,
}

// SAFETY: an SSL_CTX may be used by several threads (SSL_CTX_new's manual: reference counted, locked inside), and it is
// not changed any more once it is made.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// One connection.
pub struct Session {
    api: &'static OpenSsl,
    raw: NonNull<Ssl>,
    /// Made by `Box::into_raw`; OpenSSL holds the same pointer, for the callbacks. Nobody has a reference to it while one
    /// of OpenSSL's functions runs.
    state: NonNull<State>,
}

// SAFETY: an SSL may move between threads as long as one at a time uses it, which `&mut self` sees to.
unsafe impl Send for Session {}

/// What the callbacks work on.
struct State {
    side: Side,
    keys: Arc<Keys>,
    input: Input,
    /// Ciphertext to be sent.
    output: Vec<u8>,
    /// The last identity that the client named and for which there is a key; a client's own.
    known: Option<String>,
    /// The last one without.
    unknown: Option<String>,
}

/// Ciphertext for OpenSSL.
#[derive(Default)]
pub struct Input {
    /// Where it is, up to `end`.
    pub bytes: Vec<u8>,
    /// Its end; what is behind means nothing.
    pub end: usize,
    /// So much of it OpenSSL has taken.
    pub taken: usize,
}

impl Input {
    /// All of these.
    pub fn of(bytes: Vec<u8>) -> Input {
        Input { end: bytes.len(), taken: 0, bytes }
    }

    /// What it has not.
    pub fn rest(&self) -> &[u8] {
        self.bytes.get(self.taken..self.end).unwrap_or_default()
    }
}

/// What came of reading.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opened {
    /// So many bytes were appended.
    Bytes(usize),
    /// More ciphertext is needed.
    Nothing,
    /// The client said goodbye.
    End,
}

impl Context {
    /// A context for connections on this side.
    pub fn new(side: Side) -> Result<Context, String> {
        let api = openssl()?;
        let bio = bio_type(api)?;
        let method = match side {
            Side::Server => api.TLS_server_method,
            Side::Client => api.TLS_client_method,
        };
        // SAFETY: no preconditions; the result is checked.
        let raw = NonNull::new(unsafe { (api.SSL_CTX_new)(method()) });
        let context = Context { side, api, raw: raw.ok_or_else(|| reason(api))?, bio };
        let raw = context.raw.as_ptr();
        let options = lib::SSL_OP_NO_TICKET
            | lib::SSL_OP_NO_COMPRESSION
            | lib::SSL_OP_NO_RENEGOTIATION
            | lib::SSL_OP_CIPHER_SERVER_PREFERENCE;
        let ctrl = |command: c_int, value: c_long| {
            // SAFETY: these commands take a number and no pointer.
            unsafe { (api.SSL_CTX_ctrl)(raw, command, value, ptr::null_mut()) }
        };
        // SAFETY: `raw` is a live SSL_CTX, the lists are C strings, and the callbacks have the types asked for.
        let made = unsafe {
            (api.SSL_CTX_set_options)(raw, options);
            (api.SSL_CTX_set_security_level)(raw, SECURITY_LEVEL);
            match side {
                Side::Server => (api.SSL_CTX_set_psk_server_callback)(raw, Some(find_key)),
                Side::Client => {
                    (api.SSL_CTX_set_psk_client_callback)(raw, Some(give_key));
                    // TLS 1.3 lets a server answer with a certificate instead of the key. There is no CA here that
                    // would vouch for one, so it is refused.
                    (api.SSL_CTX_set_verify)(raw, lib::SSL_VERIFY_PEER, None);
                }
            }
            // NBD clients stay connected; resumption would only keep identities in memory.
            (api.SSL_CTX_set_num_tickets)(raw, 0) == 1
                && (api.SSL_CTX_set_ciphersuites)(raw, TLS13_CIPHERS.as_ptr()) == 1
                && (api.SSL_CTX_set_cipher_list)(raw, TLS12_CIPHERS.as_ptr()) == 1
        };
        ctrl(lib::SSL_CTRL_SET_SESS_CACHE_MODE, lib::SSL_SESS_CACHE_OFF);
        ctrl(lib::SSL_CTRL_MODE, lib::SSL_MODE_RELEASE_BUFFERS);
        let limits = ctrl(lib::SSL_CTRL_SET_MIN_PROTO_VERSION, lib::TLS1_2_VERSION) == 1
            && ctrl(lib::SSL_CTRL_SET_DH_AUTO, 1) == 1;
        if made && limits { Ok(context) } else { Err(reason(api)) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `new` made it, and sessions that still use it have references of their own.
        unsafe { (self.api.SSL_CTX_free)(self.raw.as_ptr()) }
    }
}

impl Session {
    /// A connection whose handshake has not begun. A client uses the key of its `identity`.
    pub fn new(context: &Context, keys: Arc<Keys>, identity: Option<String>) -> Result<Session, String> {
        let (api, side) = (context.api, context.side);
        // SAFETY: the context is live, and the session takes a reference of its own to it.
        let raw = NonNull::new(unsafe { (api.SSL_new)(context.raw.as_ptr()) }).ok_or_else(|| reason(api))?;
        let (input, output) = (Input::default(), Vec::new());
        let state = Box::new(State { side, keys, input, output, known: identity, unknown: None });
        // From here on `Drop` frees both.
        let session = Session { api, raw, state: NonNull::from(Box::leak(state)) };
        // SAFETY: the type is live for ever.
        let bio =
            NonNull::new(unsafe { (api.BIO_new)(context.bio.0.as_ptr()) }).ok_or_else(|| reason(api))?;
        let data = session.state.as_ptr().cast();
        // SAFETY: all three are live. SSL_set_bio takes the one reference to the BIO, which it may get twice for one
        // (its manual), and the data lives longer than both (`Drop`). Index 0 of the data is for applications.
        let set = unsafe {
            (api.BIO_set_data)(bio.as_ptr(), data);
            (api.BIO_set_init)(bio.as_ptr(), 1);
            (api.SSL_set_bio)(raw.as_ptr(), bio.as_ptr(), bio.as_ptr());
            match side {
                Side::Server => (api.SSL_set_accept_state)(raw.as_ptr()),
                Side::Client => (api.SSL_set_connect_state)(raw.as_ptr()),
            }
            (api.SSL_set_ex_data)(raw.as_ptr(), 0, data)
        };
        if set == 1 { Ok(session) } else { Err(reason(api)) }
    }

    /// Goes on with the handshake; false if more ciphertext is needed.
    pub fn handshake(&mut self) -> Result<bool, String> {
        // SAFETY: the session is live, and no reference to its state is held.
        let result = unsafe {
            (self.api.ERR_clear_error)();
            (self.api.SSL_do_handshake)(self.raw.as_ptr())
        };
        if result == 1 {
            return Ok(true);
        }
        match self.failure(result) {
            lib::SSL_ERROR_WANT_READ => Ok(false),
            _ => Err(self.why_not()),
        }
    }

    /// Whether the handshake is over.
    pub fn is_ready(&self) -> bool {
        // SAFETY: the session is live; this only looks.
        unsafe { (self.api.SSL_is_init_finished)(self.raw.as_ptr()) == 1 }
    }

    /// The version of TLS.
    pub fn version(&self) -> Option<&'static str> {
        // SAFETY: the session is live, and the text is one of OpenSSL's constants.
        let text = unsafe { CStr::from_ptr((self.api.SSL_get_version)(self.raw.as_ptr())) };
        text.to_str().ok()
    }

    /// Whose key the client has, once the handshake is over. OpenSSL takes the first identity of which it gets a usable
    /// key, and asks for no further one.
    pub fn identity(&self) -> Option<&str> {
        self.state().known.as_deref()
    }

    /// Decrypts into the room of `buf`, until that is full or more ciphertext is needed.
    pub fn open(&mut self, buf: &mut Vec<u8>) -> Result<Opened, String> {
        let before = buf.len();
        loop {
            let room = c_int::try_from(buf.capacity() - buf.len()).unwrap_or(c_int::MAX);
            let moved = buf.len() - before;
            if room == 0 {
                return Ok(if moved > 0 { Opened::Bytes(moved) } else { Opened::Nothing });
            }
            let spare = buf.spare_capacity_mut();
            // SAFETY: the session is live, no reference to its state is held, and `spare` has that much room.
            let result = unsafe {
                (self.api.ERR_clear_error)();
                (self.api.SSL_read)(self.raw.as_ptr(), spare.as_mut_ptr().cast(), room)
            };
            if let Ok(got) = usize::try_from(result)
                && got > 0
            {
                // SAFETY: SSL_read has written that many bytes, no more than there was room.
                unsafe { buf.set_len(buf.len() + got) };
                continue;
            }
            let end = match self.failure(result) {
                lib::SSL_ERROR_WANT_READ => Opened::Nothing,
                lib::SSL_ERROR_ZERO_RETURN => Opened::End,
                _ => return Err(reason(self.api)),
            };
            return Ok(if moved > 0 { Opened::Bytes(moved) } else { end });
        }
    }

    /// Encrypts all of `bytes` to the output.
    pub fn seal(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Ok(len) = c_int::try_from(bytes.len()) else { return Err("too much at once".to_owned()) };
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the session is live, no reference to its state is held, and `bytes` is that long.
        let result = unsafe {
            (self.api.ERR_clear_error)();
            (self.api.SSL_write)(self.raw.as_ptr(), bytes.as_ptr().cast(), len)
        };
        // The BIO takes everything, so it is all or an error.
        if result == len { Ok(()) } else { Err(reason(self.api)) }
    }

    /// Encrypts the goodbye to the output.
    pub fn seal_goodbye(&mut self) {
        // SAFETY: the session is live, and no reference to its state is held.
        unsafe {
            (self.api.ERR_clear_error)();
            // In mid-handshake it fails, and there is nobody to say goodbye to.
            (self.api.SSL_shutdown)(self.raw.as_ptr());
        }
    }

    /// Ciphertext for OpenSSL.
    pub fn input(&mut self) -> &mut Input {
        &mut self.state_mut().input
    }

    /// Ciphertext to be sent.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.state_mut().output
    }

    /// Whether there is some.
    pub fn has_output(&self) -> bool {
        !self.state().output.is_empty()
    }

    fn state(&self) -> &State {
        // SAFETY: it lives as long as `self`; OpenSSL's functions, which are all called through `self`, do not run.
        unsafe { self.state.as_ref() }
    }

    fn state_mut(&mut self) -> &mut State {
        // SAFETY: as above, and `&mut self` makes it the only one.
        unsafe { self.state.as_mut() }
    }

    /// SSL_get_error of a result.
    fn failure(&self, result: c_int) -> c_int {
        // SAFETY: the session is live, and `result` is what its last function returned on this thread.
        unsafe { (self.api.SSL_get_error)(self.raw.as_ptr(), result) }
    }

    /// Why a handshake failed, in words.
    fn why_not(&self) -> String {
        let reason = reason(self.api);
        match (self.state().side, &self.state().known, &self.state().unknown) {
            (Side::Server, None, Some(name)) => format!("{name:?} is no identity of --tls-psk ({reason})"),
            (Side::Server, Some(name), _) => format!("{reason}; has the client the key of {name:?}?"),
            (Side::Client, Some(name), _) => format!("{reason}; has the server this key of {name:?}?"),
            (_, None, _) => reason,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: `new` made both; OpenSSL frees its session and the BIO first, and nobody else has the pointer then.
        unsafe {
            (self.api.SSL_free)(self.raw.as_ptr());
            drop(Box::from_raw(self.state.as_ptr()));
        }
    }
}

/// The oldest error of this thread's queue, which is the one that counts.
fn reason(api: &OpenSsl) -> String {
    // SAFETY: no preconditions; the text, if there is one, is a constant.
    unsafe {
        let text = (api.ERR_reason_error_string)((api.ERR_get_error)());
        if text.is_null() {
            return "OpenSSL does not say why".to_owned();
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

/// The type of our BIO: made once, and never changed or freed.
#[derive(Clone, Copy)]
struct BioType(NonNull<BioMethod>);

// SAFETY: it is only read once it is made.
unsafe impl Send for BioType {}
// SAFETY: as above.
unsafe impl Sync for BioType {}

fn bio_type(api: &'static OpenSsl) -> Result<BioType, String> {
    static MADE: OnceLock<Option<BioType>> = OnceLock::new();
    let make = || {
        // SAFETY: no preconditions; the name is a C string that lives for ever, and the functions have the types asked
        // for.
        unsafe {
            let kind = (api.BIO_get_new_index)() | lib::BIO_TYPE_SOURCE_SINK;
            let made = NonNull::new((api.BIO_meth_new)(kind, c"nbd-img".as_ptr()))?;
            let set = (api.BIO_meth_set_read)(made.as_ptr(), Some(give_input)) == 1
                && (api.BIO_meth_set_write)(made.as_ptr(), Some(take_output)) == 1
                && (api.BIO_meth_set_ctrl)(made.as_ptr(), Some(control)) == 1;
            set.then_some(BioType(made))
        }
    };
    MADE.get_or_init(make).ok_or_else(|| reason(api))
}

/// The state behind a pointer that OpenSSL hands back; null before it was set.
///
/// # Safety
///
/// It is one that [`Session::new`] gave away, and the session is in one of its own calls into OpenSSL.
unsafe fn state_of<'a>(data: *mut c_void) -> Option<&'a mut State> {
    // SAFETY: the caller's promise: the state lives, and in such a call nobody else refers to it.
    unsafe { data.cast::<State>().as_mut() }
}

/// BIO_read of our BIO: gives OpenSSL what there is of the input, or tells it to come again.
unsafe extern "C" fn give_input(bio: *mut Bio, to: *mut c_char, room: c_int) -> c_int {
    let Ok(api) = openssl() else { return -1 };
    // SAFETY: OpenSSL calls this with a BIO of ours, in a call of its session, and with that much room.
    unsafe {
        (api.BIO_clear_flags)(bio, lib::BIO_FLAGS_RWS | lib::BIO_FLAGS_SHOULD_RETRY);
        let Some(state) = state_of((api.BIO_get_data)(bio)) else { return -1 };
        let rest = state.input.rest();
        let len = rest.len().min(usize::try_from(room).unwrap_or(0));
        if len == 0 {
            (api.BIO_set_flags)(bio, lib::BIO_FLAGS_READ | lib::BIO_FLAGS_SHOULD_RETRY);
            return -1;
        }
        ptr::copy_nonoverlapping(rest.as_ptr(), to.cast(), len);
        state.input.taken += len;
        c_int::try_from(len).unwrap_or(-1)
    }
}

/// BIO_write of our BIO: takes everything.
unsafe extern "C" fn take_output(bio: *mut Bio, from: *const c_char, len: c_int) -> c_int {
    let (Ok(api), Ok(count)) = (openssl(), usize::try_from(len)) else { return -1 };
    // SAFETY: as above, and `from` has that many bytes.
    unsafe {
        (api.BIO_clear_flags)(bio, lib::BIO_FLAGS_RWS | lib::BIO_FLAGS_SHOULD_RETRY);
        let Some(state) = state_of((api.BIO_get_data)(bio)) else { return -1 };
        state.output.extend_from_slice(std::slice::from_raw_parts(from.cast(), count));
    }
    len
}

/// BIO_ctrl of our BIO: a flush succeeds, for there is nothing to do; nothing else is known.
unsafe extern "C" fn control(_: *mut Bio, command: c_int, _: c_long, _: *mut c_void) -> c_long {
    c_long::from(command == lib::BIO_CTRL_FLUSH)
}

/// Copies the key of an identity to OpenSSL and tells its length; 0 if there is none. TLS 1.3 may ask for several
/// identities, up to the first with a key.
unsafe extern "C" fn find_key(
    ssl: *mut Ssl,
    identity: *const c_char,
    key: *mut c_uchar,
    room: c_uint,
) -> c_uint {
    let Ok(api) = openssl() else { return 0 };
    if identity.is_null() {
        return 0;
    }
    // SAFETY: OpenSSL calls this in a call of a session of ours, with a C string and that much room.
    unsafe {
        let Some(state) = state_of((api.SSL_get_ex_data)(ssl, 0)) else { return 0 };
        let name = CStr::from_ptr(identity).to_string_lossy().into_owned();
        let found = CStr::from_ptr(identity).to_str().ok().and_then(|name| state.keys.get(name));
        let Some(found) = found.filter(|found| found.len() <= room as usize) else {
            state.unknown = Some(name);
            return 0;
        };
        ptr::copy_nonoverlapping(found.as_ptr(), key, found.len());
        let len = c_uint::try_from(found.len()).unwrap_or(0);
        state.known = Some(name);
        len
    }
}

/// Copies a client's identity and its key to OpenSSL and tells the key's length; 0 if there is none.
unsafe extern "C" fn give_key(
    ssl: *mut Ssl,
    _hint: *const c_char,
    identity: *mut c_char,
    identity_room: c_uint,
    key: *mut c_uchar,
    room: c_uint,
) -> c_uint {
    let Ok(api) = openssl() else { return 0 };
    // SAFETY: OpenSSL calls this in a call of a session of ours, with that much room in both places.
    unsafe {
        let Some(state) = state_of((api.SSL_get_ex_data)(ssl, 0)) else { return 0 };
        let Some(name) = state.known.as_deref() else { return 0 };
        let found = state.keys.get(name).filter(|found| found.len() <= room as usize);
        // Behind it a zero byte ends the string.
        let (Some(found), true) = (found, name.len() < identity_room as usize) else { return 0 };
        ptr::copy_nonoverlapping(name.as_ptr(), identity.cast(), name.len());
        identity.add(name.len()).write(0);
        ptr::copy_nonoverlapping(found.as_ptr(), key, found.len());
        c_uint::try_from(found.len()).unwrap_or(0)
    }
}
