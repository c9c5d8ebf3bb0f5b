//! A disk served under TLS, with a CA of the tests and folders of certificates for both sides.

use std::fs;
use std::path::PathBuf;

use super::certificates::{Authority, CLIENT, SERVER, Says, client_folder, server_folder};
use super::rng::Rng;
use super::server::{Serve, Server};

pub const DISK_LEN: usize = 16 << 20;

/// A disk with content, and who vouches for both sides.
pub struct Rig {
    pub folder: tempfile::TempDir,
    pub authority: Authority,
    pub content: Vec<u8>,
}

impl Rig {
    /// A disk, a CA, and the folders `server` and `client`.
    pub fn new(test: &str) -> Self {
        let folder = super::scratch(test);
        let authority = Authority::new("the CA of the tests");
        let content = Rng::fixed(31).bytes(DISK_LEN);
        fs::write(folder.path().join("disk"), &content).unwrap();
        server_folder(&folder.path().join("server"), &authority, SERVER);
        client_folder(&folder.path().join("client"), &authority, CLIENT, &authority.cert);
        Self { folder, authority, content }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn serve(&self, args: &[&str]) -> Server {
        let folder = self.path("server");
        let all = [&["--tls-dir", folder.to_str().unwrap()], args].concat();
        Serve::image(self.path("disk")).format("raw").args(&all).start()
    }

    /// A client's folder with a certificate like this.
    pub fn client(&self, name: &str, authority: &Authority, says: Says) -> PathBuf {
        let folder = self.path(name);
        client_folder(&folder, authority, says, &self.authority.cert);
        folder
    }
}
