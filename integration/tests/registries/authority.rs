//! A certificate authority of a test's own, and what it vouches for, as files.

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: PathBuf,
}

/// PEM files.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    /// Its certificate is `ca.pem` in `directory`.
    pub(crate) fn new(directory: &Path) -> Result<Authority> {
        let mut params = CertificateParams::new(Vec::new())?;
        // One name for an authority and what it signs would look like a certificate that is its own.
        params.distinguished_name.push(DnType::CommonName, "authority of the test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let authority = Authority { issuer, directory: directory.to_owned() };
        fs::write(authority.certificate(), authority.issuer.pem())?;
        Ok(authority)
    }

    pub(crate) fn certificate(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    fn signed(&self, names: &[&str], purpose: ExtendedKeyUsagePurpose) -> Result<(rcgen::Certificate, KeyPair)> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        params.extended_key_usages = vec![purpose];
        Ok((params.signed_by(&key, &self.issuer)?, key))
    }

    fn files(&self, file: &str, signed: &(rcgen::Certificate, KeyPair)) -> Result<Pair> {
        let pair =
            Pair { certificate: self.directory.join(format!("{file}.pem")), key: self.directory.join(format!("{file}.key")) };
        fs::write(&pair.certificate, signed.0.pem())?;
        fs::write(&pair.key, signed.1.serialize_pem())?;
        Ok(pair)
    }

    /// For a server that is reached by these names or addresses.
    pub(crate) fn server(&self, file: &str, names: &[&str]) -> Result<Pair> {
        self.files(file, &self.signed(names, ExtendedKeyUsagePurpose::ServerAuth)?)
    }

    /// For a client.
    pub(crate) fn client(&self, file: &str) -> Result<Pair> {
        self.files(file, &self.signed(&["a node"], ExtendedKeyUsagePurpose::ClientAuth)?)
    }

    /// For a server of the test's own on loopback.
    pub(crate) fn config(&self) -> Result<Arc<ServerConfig>> {
        let (certificate, key) = self.signed(&["127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?.with_no_client_auth();
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        Ok(Arc::new(builder.with_single_cert(vec![certificate.der().clone()], key)?))
    }
}
