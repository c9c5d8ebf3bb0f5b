//! The server's TLS: which files it is made of, and taking them anew on SIGHUP or when they have changed.
//!
//! A set of files that does not fit together is refused with the file and the reason, and what was in force stays in
//! force: a certificate and its key are rarely replaced in one step. Connections keep what they began with.
//!
//! With `--tls-psk` it is one file of keys, and OpenSSL instead of rustls.
//!
//! rustls computes with ring: it needs nothing but a C compiler to be built, where aws-lc-rs takes several times as
//! long and more tools on some machines. What ring lacks of what GnuTLS makes is keys on the curve P-521.

use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::RwLock;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::psk_file;
use crate::nbd::negotiate::TlsMode;
use crate::transport::tls::TlsServer;
use crate::transport::tls::psk::{Keys, PskServer};

/// How often the files are looked at. Our choice.
const LOOK_TIME: Duration = Duration::from_secs(5);

/// From when on the log warns of a certificate's end, and how often. Our choice.
const EXPIRY_WARN_SECONDS: i64 = 30 * DAY_SECONDS;
const DAY_SECONDS: i64 = 86_400;

/// Where the server's identity and its clients' come from. All are PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and its CA.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CAs of clients; clients need a certificate if it is given.
    pub client_ca: Option<PathBuf>,
    /// Certificates that those CAs have revoked.
    pub crl: Option<PathBuf>,
    /// Whether that file has to be there; else one that is not revokes none.
    pub needs_crl: bool,
}

/// What clients and the server know each other by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsSource {
    /// Certificates.
    Certificates(TlsFiles),
    /// The pre-shared keys in this file.
    Psk(PathBuf),
}

/// How the operator wants TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsOptions {
    /// The files.
    pub source: TlsSource,
    /// Whether clients may do without.
    pub mode: TlsMode,
}

/// Why there is no TLS: the file and the reason.
#[derive(Debug, PartialEq, Eq)]
pub struct TlsError {
    path: PathBuf,
    text: String,
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.to_string_lossy().escape_debug(), self.text)
    }
}

/// The TLS of a server while it runs.
pub struct Tls {
    options: TlsOptions,
    current: RwLock<Loaded>,
    reload: Notify,
}

struct Loaded {
    server: TlsServer,
    /// When the server's certificate ends, in seconds since 1970.
    not_after: Option<i64>,
}

impl Tls {
    /// Reads the files.
    pub fn load(options: TlsOptions) -> Result<Arc<Tls>, TlsError> {
        let loaded = load(&options.source)?;
        Ok(Arc::new(Tls { options, current: RwLock::new(loaded), reload: Notify::new() }))
    }

    /// Whether clients may do without.
    pub fn mode(&self) -> TlsMode {
        self.options.mode
    }

    /// What new connections get.
    pub fn server(&self) -> TlsServer {
        self.current.read().server.clone()
    }

    /// Has the files read again, whether or not they have changed.
    pub fn reload(&self) {
        self.reload.notify_one();
    }

    /// Reads the files again whenever it is asked to or they have changed, and warns before the certificate ends. For
    /// ever; to be run in the control runtime.
    pub async fn keep_up(self: Arc<Self>) {
        let mut seen = self.stamps().await;
        let mut warned_at = None;
        loop {
            let now = unix_time();
            let left = self.current.read().not_after.map_or(i64::MAX, |end| end - now);
            if is_warning_due(left, now, warned_at) {
                warned_at = Some(now);
                let path = self.options.source.paths().next();
                tracing::warn!(
                    ?path,
                    days = left / DAY_SECONDS,
                    "the server's certificate ends soon or has ended"
                );
            }
            let asked = timeout(LOOK_TIME, self.reload.notified()).await.is_ok();
            let stamps = self.stamps().await;
            if asked || stamps != seen {
                seen = stamps;
                self.read_again().await;
                warned_at = None;
            }
        }
    }

    async fn read_again(self: &Arc<Self>) {
        let source = self.options.source.clone();
        match spawn_blocking(move || load(&source)).await {
            Ok(Ok(loaded)) => {
                *self.current.write() = loaded;
                tracing::info!("the files of TLS were read again");
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "the new files of TLS cannot be used; those from before stay in force");
            }
            Err(error) => tracing::error!(%error, "reading the files of TLS went wrong"),
        }
    }

    /// What shows that a file has changed. Read on a thread of its own: the folder may be on a network.
    async fn stamps(&self) -> Vec<Option<(u64, u64, i64, i64)>> {
        let source = self.options.source.clone();
        let stamp =
            |metadata: Metadata| (metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec());
        let look = move || source.paths().map(|path| path.metadata().ok().map(stamp)).collect();
        spawn_blocking(look).await.unwrap_or_default()
    }
}

impl TlsSource {
    /// The files, the server's own certificate first.
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let paths = match self {
            TlsSource::Certificates(TlsFiles { cert, key, client_ca, crl, .. }) => {
                [Some(cert), Some(key), client_ca.as_ref(), crl.as_ref()]
            }
            TlsSource::Psk(path) => [Some(path), None, None, None],
        };
        paths.into_iter().flatten().map(PathBuf::as_path)
    }
}

fn load(source: &TlsSource) -> Result<Loaded, TlsError> {
    match source {
        TlsSource::Certificates(files) => load_certificates(files),
        TlsSource::Psk(path) => load_keys(path),
    }
}

/// The pre-shared keys in a file of `--tls-psk`.
pub fn read_keys(path: &Path) -> Result<Keys, TlsError> {
    let text = std::fs::read(path).map_err(|error| fail(path, format!("cannot be read: {error}")))?;
    psk_file::parse(&text).map_err(|why| fail(path, why))
}

fn load_keys(path: &Path) -> Result<Loaded, TlsError> {
    let keys = read_keys(path)?;
    warn_of_open_key(path);
    tracing::info!(?path, count = keys.count(), "the pre-shared keys");
    let server = PskServer::new(keys).map_err(|why| fail(path, why))?;
    Ok(Loaded { server: TlsServer::Psk(Arc::new(server)), not_after: None })
}

fn load_certificates(files: &TlsFiles) -> Result<Loaded, TlsError> {
    let certs = certificates(&files.cert)?;
    let not_after = check_validity(&files.cert, &certs)?;
    let key =
        PrivateKeyDer::from_pem_file(&files.key).map_err(|error| pem_error(&files.key, &error, "key"))?;
    warn_of_open_key(&files.key);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = match &files.client_ca {
        None => WebPkiClientVerifier::no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(ca)? {
                roots.add(root).map_err(|error| fail(ca, format!("is no CA certificate: {error}")))?;
            }
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .with_crls(revocations(files)?)
                // A list says something of its own CA only.
                .allow_unknown_revocation_status()
                // A list that is out of date no longer tells who is revoked, so nobody is let in by it.
                .enforce_revocation_expiration()
                .build()
                .map_err(|error| fail(files.crl.as_ref().unwrap_or(ca), error.to_string()))?
        }
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|error| fail(&files.cert, error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certs, key)
        .map_err(|error| {
            let cert = files.cert.to_string_lossy();
            fail(&files.key, format!("cannot be used with {}: {error}", cert.escape_debug()))
        })?;
    // NBD clients stay connected; resumption would only keep identities in memory.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Loaded { server: TlsServer::Certificates(Arc::new(config)), not_after: Some(not_after) })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, pem::Error>>();
    match read() {
        Ok(certs) if certs.is_empty() => Err(fail(path, "has no certificate in PEM form".to_owned())),
        Ok(certs) => Ok(certs),
        Err(error) => Err(pem_error(path, &error, "certificate")),
    }
}

fn revocations(files: &TlsFiles) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let Some(path) = files.crl.as_deref() else { return Ok(Vec::new()) };
    // A list that cannot be looked at is not one that is not there.
    if !files.needs_crl && path.try_exists().is_ok_and(|there| !there) {
        return Ok(Vec::new());
    }
    let read = || CertificateRevocationListDer::pem_file_iter(path)?.collect::<Result<Vec<_>, pem::Error>>();
    match read() {
        // Whoever puts a file there means it to revoke somebody.
        Ok(crls) if crls.is_empty() => Err(fail(path, "has no revocation list in PEM form".to_owned())),
        Ok(crls) => Ok(crls),
        Err(error) => Err(pem_error(path, &error, "revocation list")),
    }
}

/// When the server's own certificate ends; it must hold now.
fn check_validity(path: &Path, certs: &[CertificateDer<'_>]) -> Result<i64, TlsError> {
    let broken = |why: String| fail(path, format!("is no certificate: {why}"));
    let own = certs.first().ok_or_else(|| broken("it is empty".to_owned()))?;
    let (_, parsed) = X509Certificate::from_der(own).map_err(|error| broken(error.to_string()))?;
    let validity = parsed.validity();
    let now = unix_time();
    if validity.not_after.timestamp() < now {
        return Err(fail(path, format!("the certificate ended on {}", validity.not_after)));
    }
    if validity.not_before.timestamp() > now {
        return Err(fail(path, format!("the certificate does not hold before {}", validity.not_before)));
    }
    tracing::info!(?path, subject = %parsed.subject(), until = %validity.not_after, "the server's certificate");
    Ok(validity.not_after.timestamp())
}

fn warn_of_open_key(path: &Path) {
    let mode = path.metadata().map_or(0, |metadata| metadata.permissions().mode());
    if mode & 0o007 != 0 {
        tracing::warn!(?path, mode = format!("{:o}", mode & 0o777), "everybody can use the key in this file");
    }
}

fn pem_error(path: &Path, error: &pem::Error, what: &str) -> TlsError {
    let text = if let pem::Error::Io(error) = error {
        format!("cannot be read: {error}")
    } else if let pem::Error::NoItemsFound = error {
        format!("has no {what} in PEM form")
    } else {
        format!("is no {what} in PEM form: {error}")
    };
    fail(path, text)
}

fn fail(path: &Path, text: String) -> TlsError {
    TlsError { path: path.to_owned(), text }
}

/// Whether to warn of a certificate that ends in `left` seconds; all in seconds.
fn is_warning_due(left: i64, now: i64, warned_at: Option<i64>) -> bool {
    left < EXPIRY_WARN_SECONDS && warned_at.is_none_or(|at| now.saturating_sub(at) >= DAY_SECONDS)
}

fn unix_time() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_near_end_is_warned_at_once_and_then_daily() {
        let now = unix_time();
        assert!(is_warning_due(EXPIRY_WARN_SECONDS - 1, now, None));
        assert!(!is_warning_due(EXPIRY_WARN_SECONDS, now, None));
        assert!(!is_warning_due(0, now, Some(now - DAY_SECONDS + 1)));
        assert!(is_warning_due(-1, now, Some(now - DAY_SECONDS)));
        assert!(!is_warning_due(i64::MAX, now, None), "without a certificate");
    }
}
