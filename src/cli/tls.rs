//! The flags about TLS, and what they come to.

use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::nbd::negotiate::TlsMode;
use crate::server::access::{AccessRules, Who};
use crate::server::tls::{TlsFiles, TlsOptions, TlsSource};

/// Flags about TLS.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// Offer TLS with the files of this folder: server-cert.pem, server-key.pem, ca-cert.pem and, if it is there,
    /// ca-crl.pem (the layout of QEMU, libnbd and nbdkit; `nbd-img tls init` makes one)
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["tls_cert", "tls_key", "tls_ca", "tls_crl"])]
    pub tls_dir: Option<PathBuf>,

    /// The server's certificate, and those between it and its CA (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Its key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Let in only clients that have a certificate of one of these CAs (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_ca: Option<PathBuf>,

    /// Certificates that those CAs have revoked (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_ca")]
    pub tls_crl: Option<PathBuf>,

    /// Offer TLS with the pre-shared keys of this file instead of certificates: lines of IDENTITY:HEXKEY, as psktool of
    /// GnuTLS writes them. Needs OpenSSL 3 on this machine
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["tls_dir", "tls_cert", "tls_key", "tls_ca", "tls_crl", "tls_verify_peer"]
    )]
    pub tls_psk: Option<PathBuf>,

    /// Whether clients have to use TLS [default: required if there are certificates or keys, else off]
    #[arg(long, value_name = "MODE")]
    pub tls: Option<TlsArg>,

    /// Whether clients need a certificate of ca-cert.pem [default: on with --tls-dir or --tls-ca]
    #[arg(long, value_name = "on|off")]
    pub tls_verify_peer: Option<SwitchArg>,
}

/// `--tls`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum TlsArg {
    /// No TLS
    Off,
    /// Clients may use it
    Optional,
    /// Clients get nothing without it
    Required,
}

/// On or off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum SwitchArg {
    /// Yes
    On,
    /// No
    Off,
}

/// The flags of `nbd-img tls`.
#[derive(Debug, clap::Subcommand)]
pub enum TlsCommand {
    /// Make a CA, a server certificate and a client certificate in a new folder
    Init(TlsInitArgs),
}

/// `nbd-img tls init`.
#[derive(Debug, clap::Args)]
pub struct TlsInitArgs {
    /// Where the files go
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,

    /// A name or address by which clients reach the server, beside localhost (repeatable) [default: this machine's]
    #[arg(long = "host", value_name = "NAME")]
    pub hosts: Vec<String>,

    /// The client's name in its certificate
    #[arg(long, value_name = "NAME", default_value = "nbd-img client")]
    pub client: String,

    /// Days for which the certificates hold
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = 3650,
        value_parser = clap::value_parser!(u32).range(1..=36_500)
    )]
    pub days: u32,
}

/// What the flags come to; `exports_need_it` is whether an export is only to be had under TLS.
pub fn options(args: TlsArgs, exports_need_it: bool) -> Result<Option<TlsOptions>, String> {
    let wanted = matches!(args.tls, Some(TlsArg::Optional | TlsArg::Required)) || exports_need_it;
    let verify = args.tls_verify_peer;
    let Some(source) = source(&args)? else {
        return if wanted || verify.is_some() {
            Err("TLS needs certificates or keys: add --tls-dir FOLDER (nbd-img tls init FOLDER makes one), --tls-cert \
                 and --tls-key, or --tls-psk FILE"
                .to_owned())
        } else {
            Ok(None)
        };
    };
    let mode = match args.tls {
        Some(TlsArg::Off) if exports_need_it => {
            return Err("an export is tls-required, and --tls is off".to_owned());
        }
        Some(TlsArg::Off) => return Ok(None),
        Some(TlsArg::Optional) => TlsMode::Optional,
        Some(TlsArg::Required) | None => TlsMode::Required,
    };
    Ok(Some(TlsOptions { source, mode }))
}

fn source(args: &TlsArgs) -> Result<Option<TlsSource>, String> {
    if let Some(path) = &args.tls_psk {
        return Ok(Some(TlsSource::Psk(path.clone())));
    }
    let Some(mut files) = files(args) else { return Ok(None) };
    match args.tls_verify_peer {
        Some(SwitchArg::Off) => (files.client_ca, files.crl) = (None, None),
        Some(SwitchArg::On) if files.client_ca.is_none() => {
            return Err("--tls-verify-peer on needs --tls-ca FILE to verify by".to_owned());
        }
        Some(SwitchArg::On) | None => {}
    }
    Ok(Some(TlsSource::Certificates(files)))
}

/// Refuses rules that no client can ever meet, since they would lock out those for whom they are meant.
pub fn check_access(access: &AccessRules, tls: Option<&TlsOptions>) -> Result<(), String> {
    let (certificates, keys) = match tls.map(|tls| &tls.source) {
        None => (false, false),
        Some(TlsSource::Certificates(files)) => (files.client_ca.is_some(), false),
        Some(TlsSource::Psk(_)) => (false, true),
    };
    let wants = |what: fn(&Who) -> bool| access.iter().any(|rule| what(&rule.who));
    if wants(Who::needs_certificate) && !certificates {
        return Err("an --access rule wants something of a certificate, but no client is asked for a certificate: add \
                    --tls-dir FOLDER or --tls-ca FILE"
            .to_owned());
    }
    if wants(Who::needs_psk) && !keys {
        return Err(
            "an --access rule wants a pre-shared key, but no client is asked for one: add --tls-psk FILE"
                .to_owned(),
        );
    }
    Ok(())
}

fn files(args: &TlsArgs) -> Option<TlsFiles> {
    if let Some(folder) = &args.tls_dir {
        return Some(in_folder(folder));
    }
    let (cert, key) = (args.tls_cert.clone()?, args.tls_key.clone()?);
    let (client_ca, crl) = (args.tls_ca.clone(), args.tls_crl.clone());
    Some(TlsFiles { cert, key, client_ca, crl, needs_crl: true })
}

fn in_folder(folder: &Path) -> TlsFiles {
    TlsFiles {
        cert: folder.join("server-cert.pem"),
        key: folder.join("server-key.pem"),
        client_ca: Some(folder.join("ca-cert.pem")),
        crl: Some(folder.join("ca-crl.pem")),
        needs_crl: false,
    }
}
