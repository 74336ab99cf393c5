//! The OpenAPI document: generated from the handlers and the route table, and served with a page to read it.

mod forms;

use axum::Router;
use axum::response::Response;
use axum::routing::get;
use http::{HeaderValue, header};
use serde_json::json;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::path::{Operation, PathItem, Paths};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Ref, RefOr,
    ResponseBuilder,
};
use utoipa_swagger_ui::SwaggerUi;

use super::problem::{Code, ProblemBody};

const BEARER: &str = "bearer";
const CERTIFICATE: &str = "clientCertificate";

/// What every document begins with.
pub(super) fn base() -> OpenApi {
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .bearer_format("API key (kf_<id>_<secret>) or JWT")
        .description(Some(
            "An API key, which is bound to tenants, and whose verbs are granted one by one; or a token (JWT) of an \
             issuer that the service is configured to believe. It counts more than the connection's certificate.",
        ))
        .build();
    let certificate = SecurityScheme::MutualTls {
        description: Some(
            "A client certificate of an authority that the service is configured to believe (tls.client_ca_file), and \
             that a rule under access.certificates is for."
                .to_owned(),
        ),
        deprecated: None,
        extensions: None,
    };
    let info = InfoBuilder::new()
        .title("keyfold")
        .version("v1")
        .description(Some(
            "Encryption as a service. Binary values are standard base64 with padding; envelopes are text that begins \
             with kf1. Unknown fields are refused. Errors are application/problem+json (RFC 9457) with a stable code.",
        ))
        .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build()))
        .build();
    let (problem_name, problem_schema) = (
        <ProblemBody<'_> as utoipa::ToSchema>::name().into_owned(),
        <ProblemBody<'_> as utoipa::PartialSchema>::schema(),
    );
    let components = ComponentsBuilder::new()
        .security_scheme(BEARER, SecurityScheme::Http(scheme))
        .security_scheme(CERTIFICATE, certificate)
        .schema(problem_name, problem_schema)
        .build();
    // In the order in which a reader wants them.
    let tags = [
        ("data", "Encrypt, decrypt, rewrap"),
        ("administration", "Tenants, their keys and their API keys"),
        ("health", "For those who watch the service; without credentials"),
    ];
    let tags = tags.map(|(name, what)| TagBuilder::new().name(name).description(Some(what)).build());
    OpenApiBuilder::new().info(info).components(Some(components)).tags(Some(tags)).build()
}

pub(super) use forms::add as add_forms;

/// Adds to every operation the problems that it can answer.
pub(super) fn add_problems(paths: &mut Paths, credential: bool, body: bool, problems: &[Code]) {
    for item in paths.paths.values_mut() {
        for (operation, has_body) in operations(item) {
            let mut codes = problems.to_vec();
            if credential {
                codes.extend([Code::Unauthenticated, Code::IssuerUnavailable, Code::AuditUnavailable]);
                // Either will do.
                let either = [BEARER, CERTIFICATE];
                let either = either.map(|scheme| SecurityRequirement::new(scheme, Vec::<String>::new()));
                operation.security = Some(either.to_vec());
            }
            if body && has_body {
                codes.extend([Code::TooLarge, Code::UnsupportedMediaType]);
            }
            codes.extend([Code::Overloaded, Code::DeadlineExceeded, Code::InternalError]);
            add_codes(operation, &codes);
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (&mut Operation, bool)> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().flatten().map(|operation| {
        let has_body = operation.request_body.is_some();
        (operation, has_body)
    })
}

fn add_codes(operation: &mut Operation, codes: &[Code]) {
    let mut statuses: Vec<u16> = codes.iter().map(|code| code.status().as_u16()).collect();
    statuses.sort_unstable();
    statuses.dedup();
    for status in statuses {
        let of_status: Vec<Code> =
            codes.iter().copied().filter(|code| code.status().as_u16() == status).collect();
        let names: Vec<&str> = of_status.iter().map(|code| code.name()).collect();
        let mut content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem")));
        for code in &of_status {
            let example = ExampleBuilder::new().summary(code.title()).value(Some(example(*code))).build();
            content = content.examples_from_iter([(code.name(), example)]);
        }
        let problem = ResponseBuilder::new()
            .description(names.join(", "))
            .content("application/problem+json", content.build())
            .build();
        // The health route documents its own 503, which has another body.
        operation.responses.responses.entry(status.to_string()).or_insert(RefOr::T(problem));
    }
}

fn example(code: Code) -> serde_json::Value {
    json!({
        "type": format!("urn:keyfold:problem:{}", code.name()),
        "title": code.title(),
        "status": code.status().as_u16(),
        "detail": code.example(),
        "code": code.name(),
        "retryable": code.retryable(),
        "request_id": "4b1f0a6c9d3e2f10-2a",
    })
}

/// The document as it is in the tree, which a test holds to the routes.
const DOCUMENT: &str = include_str!("../../openapi/v1.json");

/// `/openapi.json`, and `/docs`, which needs nothing from elsewhere.
pub(super) fn pages<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let config = utoipa_swagger_ui::Config::new(["/openapi.json"])
        // Not even the address of a service is anybody else's business.
        .validator_url("none");
    let docs: Router<S> = SwaggerUi::new("/docs").config(config).into();
    let docs = docs.layer(axum::middleware::map_response(protect));
    docs.route("/openapi.json", get(([(header::CONTENT_TYPE, "application/json")], DOCUMENT)))
}

/// The page may load what comes from this service, and nothing else; it may not be framed. `style-src` allows
/// inline styles, which the page sets from its script; `img-src data:` its icons.
async fn protect(mut response: Response) -> Response {
    const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
                          img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                          frame-ancestors 'none'";
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}
