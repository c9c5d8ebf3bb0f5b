//! OpenSSL 3, loaded when it is first needed: the functions that [`super::openssl`] calls, and their constants.
//!
//! Why not linked: whoever builds this program would need OpenSSL's headers, or minutes of its own build and Perl, for a
//! feature that few use. Why the system's: its distribution mends it. A machine without it lacks `--tls-psk` alone, which
//! then says so.
//!
//! This file takes symbols for functions of the types that OpenSSL's manual pages give them, which nothing can check.

use std::ffi::{c_char, c_int, c_long, c_uchar, c_uint, c_ulong, c_void};
use std::sync::OnceLock;

use libloading::Library;

/// The file that Linux distributions give OpenSSL 3 (which keeps its interface until 4), and the Debian package it is in.
const FILE: &str = "libssl.so.3";
const PACKAGE: &str = "libssl3";

/// Objects of OpenSSL, whose insides are its own.
#[repr(C)]
pub struct SslCtx([u8; 0]);
#[repr(C)]
pub struct Ssl([u8; 0]);
#[repr(C)]
pub struct SslMethod([u8; 0]);
#[repr(C)]
pub struct Bio([u8; 0]);
#[repr(C)]
pub struct BioMethod([u8; 0]);

pub type PskCallback = unsafe extern "C" fn(*mut Ssl, *const c_char, *mut c_uchar, c_uint) -> c_uint;
pub type PskClientCallback =
    unsafe extern "C" fn(*mut Ssl, *const c_char, *mut c_char, c_uint, *mut c_uchar, c_uint) -> c_uint;
pub type VerifyCallback = unsafe extern "C" fn(c_int, *mut c_void) -> c_int;
pub type BioRead = unsafe extern "C" fn(*mut Bio, *mut c_char, c_int) -> c_int;
pub type BioWrite = unsafe extern "C" fn(*mut Bio, *const c_char, c_int) -> c_int;
pub type BioCtrl = unsafe extern "C" fn(*mut Bio, c_int, c_long, *mut c_void) -> c_long;

// From the headers of OpenSSL 3.0: openssl/ssl.h.
pub const SSL_ERROR_WANT_READ: c_int = 2;
pub const SSL_ERROR_ZERO_RETURN: c_int = 6;
pub const SSL_CTRL_MODE: c_int = 33;
pub const SSL_CTRL_SET_SESS_CACHE_MODE: c_int = 44;
pub const SSL_CTRL_SET_DH_AUTO: c_int = 118;
pub const SSL_CTRL_SET_MIN_PROTO_VERSION: c_int = 123;
pub const SSL_VERIFY_PEER: c_int = 1;
pub const SSL_SESS_CACHE_OFF: c_long = 0;
pub const SSL_MODE_RELEASE_BUFFERS: c_long = 0x10;
pub const SSL_OP_NO_TICKET: u64 = 1 << 14;
pub const SSL_OP_NO_COMPRESSION: u64 = 1 << 17;
pub const SSL_OP_CIPHER_SERVER_PREFERENCE: u64 = 1 << 22;
pub const SSL_OP_NO_RENEGOTIATION: u64 = 1 << 30;
pub const TLS1_2_VERSION: c_long = 0x0303;
// openssl/bio.h
pub const BIO_TYPE_SOURCE_SINK: c_int = 0x0400;
pub const BIO_FLAGS_RWS: c_int = 0x07;
pub const BIO_FLAGS_READ: c_int = 0x01;
pub const BIO_FLAGS_SHOULD_RETRY: c_int = 0x08;
pub const BIO_CTRL_FLUSH: c_int = 11;
// openssl/crypto.h
const OPENSSL_INIT_NO_ATEXIT: u64 = 0x0008_0000;

macro_rules! functions {
    ($(fn $name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions, by their own names: `man 3 NAME`.
        #[allow(non_snake_case)]
        pub struct OpenSsl {
            $(pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl OpenSsl {
            fn find(library: &Library) -> Result<OpenSsl, libloading::Error> {
                Ok(OpenSsl {
                    // SAFETY: the type is that of the function's manual page and header in OpenSSL 3, and the library
                    // is never unloaded (see `load`), so the pointer may outlive the symbol.
                    $($name: *unsafe { library.get(concat!(stringify!($name), "\0"))? },)*
                })
            }
        }
    };
}

functions! {
    fn OPENSSL_init_ssl(u64, *const c_void) -> c_int;
    fn TLS_server_method() -> *const SslMethod;
    fn TLS_client_method() -> *const SslMethod;
    fn SSL_CTX_new(*const SslMethod) -> *mut SslCtx;
    fn SSL_CTX_free(*mut SslCtx);
    fn SSL_CTX_ctrl(*mut SslCtx, c_int, c_long, *mut c_void) -> c_long;
    fn SSL_CTX_set_options(*mut SslCtx, u64) -> u64;
    fn SSL_CTX_set_cipher_list(*mut SslCtx, *const c_char) -> c_int;
    fn SSL_CTX_set_ciphersuites(*mut SslCtx, *const c_char) -> c_int;
    fn SSL_CTX_set_security_level(*mut SslCtx, c_int);
    fn SSL_CTX_set_num_tickets(*mut SslCtx, usize) -> c_int;
    fn SSL_CTX_set_psk_server_callback(*mut SslCtx, Option<PskCallback>);
    fn SSL_CTX_set_psk_client_callback(*mut SslCtx, Option<PskClientCallback>);
    fn SSL_CTX_set_verify(*mut SslCtx, c_int, Option<VerifyCallback>);
    fn SSL_new(*mut SslCtx) -> *mut Ssl;
    fn SSL_free(*mut Ssl);
    fn SSL_set_accept_state(*mut Ssl);
    fn SSL_set_connect_state(*mut Ssl);
    fn SSL_set_bio(*mut Ssl, *mut Bio, *mut Bio);
    fn SSL_set_ex_data(*mut Ssl, c_int, *mut c_void) -> c_int;
    fn SSL_get_ex_data(*const Ssl, c_int) -> *mut c_void;
    fn SSL_do_handshake(*mut Ssl) -> c_int;
    fn SSL_is_init_finished(*const Ssl) -> c_int;
    fn SSL_get_version(*const Ssl) -> *const c_char;
    fn SSL_read(*mut Ssl, *mut c_void, c_int) -> c_int;
    fn SSL_write(*mut Ssl, *const c_void, c_int) -> c_int;
    fn SSL_shutdown(*mut Ssl) -> c_int;
    fn SSL_get_error(*const Ssl, c_int) -> c_int;
    fn BIO_get_new_index() -> c_int;
    fn BIO_meth_new(c_int, *const c_char) -> *mut BioMethod;
    fn BIO_meth_set_read(*mut BioMethod, Option<BioRead>) -> c_int;
    fn BIO_meth_set_write(*mut BioMethod, Option<BioWrite>) -> c_int;
    fn BIO_meth_set_ctrl(*mut BioMethod, Option<BioCtrl>) -> c_int;
    fn BIO_new(*const BioMethod) -> *mut Bio;
    fn BIO_set_init(*mut Bio, c_int);
    fn BIO_set_data(*mut Bio, *mut c_void);
    fn BIO_get_data(*mut Bio) -> *mut c_void;
    fn BIO_set_flags(*mut Bio, c_int);
    fn BIO_clear_flags(*mut Bio, c_int);
    fn ERR_clear_error();
    fn ERR_get_error() -> c_ulong;
    fn ERR_reason_error_string(c_ulong) -> *const c_char;
}

/// OpenSSL, loaded at the first call. The text says what to install.
pub fn openssl() -> Result<&'static OpenSsl, String> {
    static LOADED: OnceLock<Result<OpenSsl, String>> = OnceLock::new();
    LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> Result<OpenSsl, String> {
    let explain = |error: libloading::Error| {
        format!(
            "pre-shared keys need OpenSSL 3 on this machine ({error}); install {FILE}, which is in Debian's package {PACKAGE}"
        )
    };
    // SAFETY: OpenSSL's initialisation has no preconditions; on first use it may read the system's openssl.cnf.
    let library = unsafe { Library::new(FILE) }.map_err(explain)?;
    let found = OpenSsl::find(&library).map_err(explain)?;
    // Never unloaded: its functions are called until the end.
    std::mem::forget(library);
    // SAFETY: as its manual page says: any time before other calls, settings may be null. Without a cleanup at exit,
    // since threads may still be in its functions then.
    if unsafe { (found.OPENSSL_init_ssl)(OPENSSL_INIT_NO_ATEXIT, std::ptr::null()) } != 1 {
        return Err("OpenSSL does not start: its configuration (openssl.cnf) may be broken".to_owned());
    }
    Ok(found)
}
