//! `nbd-img tls init`: a CA of one's own, and a certificate each for a server and a client, in the folder layout that
//! `--tls-dir`, QEMU, libnbd and nbdkit read.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::tls::TlsInitArgs;

/// How long before now certificates begin to hold: clocks differ. Our choice.
const BEGIN_EARLIER: Duration = Duration::from_secs(3600);

const DAY: Duration = Duration::from_secs(86_400);

/// Names of the files, with their modes: keys are their owner's alone.
const FILES: [(&str, u32); 6] = [
    ("ca-cert.pem", 0o644),
    ("ca-key.pem", 0o600),
    ("server-cert.pem", 0o644),
    ("server-key.pem", 0o600),
    ("client-cert.pem", 0o644),
    ("client-key.pem", 0o600),
];

/// Makes all files, or none that was there before: it never overwrites.
pub fn run(args: &TlsInitArgs) -> Result<(), String> {
    let folder = args.folder.as_path();
    let about =
        |error: &dyn std::fmt::Display| format!("{}: {error}", folder.to_string_lossy().escape_debug());
    if let Some((name, _)) = FILES.iter().find(|(name, _)| folder.join(name).exists()) {
        return Err(about(&format!(
            "{name} is there already; choose another folder, or remove what is not needed"
        )));
    }
    let contents = make(args).map_err(|error| about(&error))?;
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| about(&error))?;
    for ((name, mode), content) in FILES.iter().zip(&contents) {
        write(&folder.join(name), *mode, content).map_err(|error| about(&format!("{name}: {error}")))?;
    }
    let mut out = io::stdout();
    // Nobody is left to be told when stdout is closed.
    let _ = writeln!(
        out,
        "made a CA, a server certificate and a client certificate in {0}\n\
         serve:  nbd-img serve --tls-dir {0} IMAGE\n\
         client: needs ca-cert.pem, client-cert.pem and client-key.pem; ca-key.pem should stay here",
        folder.to_string_lossy().escape_debug()
    );
    Ok(())
}

/// The contents of [`FILES`], in that order.
fn make(args: &TlsInitArgs) -> Result<[String; 6], rcgen::Error> {
    let ca_key = KeyPair::generate()?;
    let mut ca = params(args, "nbd-img CA", Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_cert = ca.self_signed(&ca_key)?.pem();
    let ca_key_pem = ca_key.serialize_pem();
    let issuer = Issuer::new(ca, ca_key);
    let mut hosts: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    let named = if args.hosts.is_empty() { host_name().into_iter().collect() } else { args.hosts.clone() };
    hosts.extend(named.iter().filter(|name| *name != "localhost").cloned());
    let server_name = named.first().map_or("localhost", String::as_str).to_owned();
    let server = leaf(args, &issuer, &server_name, hosts, ExtendedKeyUsagePurpose::ServerAuth)?;
    let client = leaf(args, &issuer, &args.client, Vec::new(), ExtendedKeyUsagePurpose::ClientAuth)?;
    Ok([ca_cert, ca_key_pem, server.0, server.1, client.0, client.1])
}

/// A certificate and its key.
fn leaf(
    args: &TlsInitArgs,
    issuer: &Issuer<'_, KeyPair>,
    name: &str,
    hosts: Vec<String>,
    usage: ExtendedKeyUsagePurpose,
) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = params(args, name, hosts)?;
    // The second one means nothing for these keys, but QEMU looks for it.
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    Ok((params.signed_by(&key, issuer)?.pem(), key.serialize_pem()))
}

fn params(args: &TlsInitArgs, name: &str, hosts: Vec<String>) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now();
    params.not_before = (now - BEGIN_EARLIER).into();
    params.not_after = (now + DAY * args.days).into();
    Ok(params)
}

fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_str().ok()?.to_owned();
    (!name.is_empty()).then_some(name)
}

fn write(path: &Path, mode: u32, content: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let written = file.write_all(content.as_bytes()).and_then(|()| file.sync_all());
    if written.is_err() && path.file_name() != Some(OsStr::new("")) {
        // The error that counts is the first.
        let _ = fs::remove_file(path);
    }
    written
}
