// Swagger UI on the OpenAPI document of this server.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,  // no request to another server
});
