//! The SDK's clients: one for each region and role, all on one pool of connections.

use std::sync::Arc;
use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::sts::AssumeRoleProvider;
use aws_config::timeout::TimeoutConfig;
use aws_config::{AppName, BehaviorVersion, SdkConfig};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::retry::RetryConfig;
use aws_sdk_kms::config::{Region, SharedCredentialsProvider, SharedHttpClient};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use aws_smithy_http_client::{Builder, ConnectorBuilder};
use tokio::sync::OnceCell;

use super::Options;
use crate::kms::KmsError;
use crate::tenant::{AssumedRole, Kek};

/// Shown to the owner of an assumed role in his CloudTrail.
const SESSION_NAME: &str = "keyfold";

/// Makes clients when they are needed, and keeps them.
pub(super) struct Clients {
    options: Options,
    /// In place of the SDK's chain.
    credentials: Option<SharedCredentialsProvider>,
    base: OnceCell<SdkConfig>,
    made: papaya::HashMap<Reach, Arc<OnceCell<Client>>>,
}

/// What a client is for.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Reach {
    region: String,
    role: Option<AssumedRole>,
}

impl Clients {
    pub(super) fn new(options: Options, credentials: Option<SharedCredentialsProvider>) -> Self {
        Self { options, credentials, base: OnceCell::new(), made: papaya::HashMap::new() }
    }

    /// The client for this KEK.
    pub(super) async fn of(&self, kek: &Kek) -> Result<Client, KmsError> {
        let region =
            kek.id.region().ok_or_else(|| KmsError::denied(&kek.id, "it is not a key of AWS KMS"))?;
        let reach = Reach { region: region.to_owned(), role: kek.role.clone() };
        let slot = Arc::clone(self.made.pin().get_or_insert_with(reach.clone(), Arc::default));
        Ok(slot.get_or_init(|| self.make(reach)).await.clone())
    }

    async fn make(&self, reach: Reach) -> Client {
        let region = Region::new(reach.region.clone());
        let base = self.base.get_or_init(|| self.load(region.clone())).await;
        let mut config = aws_sdk_kms::config::Builder::from(base)
            .region(region)
            // `guarded` tries again: two who do would multiply.
            .retry_config(RetryConfig::disabled())
            .timeout_config(self.timeouts());
        if let Some(endpoint) = &self.options.kms_endpoint {
            config = config.endpoint_url(endpoint.replace("{region}", &reach.region));
        }
        if let Some(role) = &reach.role {
            config = config.credentials_provider(self.assume(base, role, &reach.region).await);
        }
        Client::from_conf(config.build())
    }

    /// What all clients share: the credential chain and the connections.
    async fn load(&self, fallback: Region) -> SdkConfig {
        // The region of the SDK's own calls (for a web identity, say). The chain's default would ask the instance
        // for it, which outside of AWS takes seconds.
        let region = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
            .or_else(ProfileFileRegionProvider::new())
            .or_else(fallback);
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .region(region)
            .timeout_config(self.timeouts())
            .http_client(connections(Duration::from_secs(self.options.connection_idle_secs_max)));
        if let Ok(name) = AppName::new("keyfold") {
            loader = loader.app_name(name);
        }
        if let Some(credentials) = &self.credentials {
            loader = loader.credentials_provider(credentials.clone());
        }
        if let Some(fips) = self.options.fips {
            loader = loader.use_fips(fips);
        }
        loader.load().await
    }

    /// The role is assumed in the KEK's own region, so that another region's trouble is none of its.
    async fn assume(&self, base: &SdkConfig, role: &AssumedRole, region: &str) -> SharedCredentialsProvider {
        let mut config = base.to_builder().retry_config(RetryConfig::disabled());
        if let Some(endpoint) = &self.options.sts_endpoint {
            config = config.endpoint_url(endpoint.replace("{region}", region));
        }
        let mut provider = AssumeRoleProvider::builder(role.arn.as_ref())
            .configure(&config.build())
            .region(Region::new(region.to_owned()))
            .session_name(SESSION_NAME)
            .session_length(Duration::from_secs(self.options.role_session_secs));
        if let Some(external_id) = &role.external_id {
            provider = provider.external_id(external_id.as_ref());
        }
        SharedCredentialsProvider::new(provider.build().await)
    }

    /// The time for a whole call is `guarded`'s; here stands only what it cannot see.
    fn timeouts(&self) -> TimeoutConfig {
        TimeoutConfig::builder().connect_timeout(Duration::from_millis(self.options.connect_ms_max)).build()
    }
}

/// The SDK's default client in all but when idle connections are closed.
fn connections(idle: Duration) -> SharedHttpClient {
    Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = ConnectorBuilder::default()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .pool_idle_timeout(idle);
        connector.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            connector.set_sleep_impl(components.sleep_impl());
        }
        connector.set_proxy_config(Some(ProxyConfig::from_env()));
        connector.build()
    })
}
