//! The description of the API, made from the code.

use utoipa::openapi::{
    Components, Info, OpenApi, RefOr, Schema,
    security::{Http, HttpAuthScheme, SecurityScheme},
};

use crate::{error, market, notification, release::Release, stream, trade, user};

/// The OpenAPI document of all services of a release.
pub fn document(release: Release) -> OpenApi {
    let services = [
        user::routes().into_openapi(),
        trade::routes().into_openapi(),
        market::routes().into_openapi(),
        notification::routes().into_openapi(),
        stream::routes().into_openapi(),
    ];
    let problems = [error::PROBLEMS, user::PROBLEMS, trade::PROBLEMS];

    let mut document = OpenApi::default();
    for service in services {
        document.merge(service);
    }
    document.info = Info::new("exchange", release.version);
    document.info.description = Some(description(&problems));
    let components = document.components.get_or_insert_with(Components::default);
    components.add_security_scheme(
        "access_token",
        SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)),
    );
    let codes = problems
        .iter()
        .copied()
        .flatten()
        .map(|problem| problem.code.into());
    if let Some(RefOr::T(Schema::Object(problem))) = components.schemas.get_mut("ProblemDocument")
        && let Some(RefOr::T(Schema::Object(code))) = problem.properties.get_mut("code")
    {
        code.enum_values = Some(codes.collect());
    }
    if !release.has_freezes
        && let Some(RefOr::T(Schema::Object(account))) = components.schemas.get_mut("Account")
    {
        account.properties.remove("frozen_at");
    }
    document
}

fn description(problems: &[&[error::Problem]]) -> String {
    let rows = problems.iter().copied().flatten().map(|problem| {
        format!(
            "| `{}` | {} | {} |\n",
            problem.code,
            problem.status.as_u16(),
            problem.title
        )
    });
    let rows: String = rows.collect();
    format!(
        "Every response names the stack that answered in `x-exchange-stack`. Failures are problem documents (RFC 9457) \
         with a stable `code`:\n\n| code | status | meaning |\n|---|---|---|\n{rows}"
    )
}
